"""The backward of attention as one Pallas kernel for a TPU.

For one row of a batch it computes the gradients of queries, keys and values in one pass over the
scores, each computed once (FlashAttention-2, arXiv:2307.08691, algorithm 2). A kv head's keys,
values and their fp32 gradients stay in the chip's vector memory while all query heads of its group
pass by, so no partial gradient goes to HBM, keys and values are not repeated, and dq has one
rounding. jax's own backward writes dq once per block of keys, in the dtype of q, and adds them up
later.

Keys that no query of a block can see are not computed: later ones, those before its earliest
segment's first position, and those outside the window.

A sequence too long for the vector memory is cut into spans of keys; each gives a partial dq.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchprime.torch_xla_models.splash.blocks import Blocks

LANES = 128
# exp(MASKED - log-sum-exp) is 0 and MASKED is finite, so that nothing is NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# Contractions: over both last dims, last with first, first with first.
LAST_LAST = (((1,), (1,)), ((), ()))
LAST_FIRST = (((1,), (0,)), ((), ()))
FIRST_FIRST = (((0,), (0,)), ((), ()))


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segment_ids: jax.Array,
    first_keys: jax.Array,
    out: jax.Array,
    log_sum_exp: jax.Array,
    grad: jax.Array,
    *,
    blocks: Blocks,
    window: int | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v of one row.

    Args:
        q: [H, S, h], scaled.
        k, v: [K, S, h], K divides H.
        segment_ids: [S], int32.
        first_keys: [S], int32, the first position of each position's segment.
        out, grad: [H, S, h], the forward's result and its gradient.
        log_sum_exp: [H, S], fp32, of each query's scores.
        window: positions that a query sees, its own among them; None for all.
    """
    H, S, h = q.shape
    K, group = k.shape[0], H // k.shape[0]
    spans, steps = S // blocks.span, S // blocks.queries
    delta = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)

    def of_queries(span, head, member, step, *_):
        return head * group + member, step, 0

    def of_rows(span, head, member, step, *_):
        return head * group + member, 0, step

    def of_keys(span, head, *_):
        return head, span, 0

    queries = pl.BlockSpec((None, blocks.queries, h), of_queries)
    rows = pl.BlockSpec((None, 1, blocks.queries), of_rows)
    keys = pl.BlockSpec((None, blocks.span, h), of_keys)
    query_ids = pl.BlockSpec((1, blocks.queries), lambda span, head, member, step, *_: (0, step))
    key_ids = pl.BlockSpec((blocks.span, LANES), lambda span, *_: (span, 0))
    partial_dq = pl.BlockSpec(
        (None, None, blocks.queries, h),
        lambda span, head, member, step, *_: (span, head * group + member, step, 0),
    )
    dq_dtype = q.dtype if spans == 1 else jnp.float32
    kernel = pl.pallas_call(
        partial(_kernel, blocks=blocks, group=group, window=window),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(spans, K, group, steps),
            in_specs=[queries, keys, keys, query_ids, key_ids, rows, rows, queries],
            out_specs=[partial_dq, keys, keys],
            scratch_shapes=[
                pltpu.VMEM((blocks.queries, h), jnp.float32),
                pltpu.VMEM((blocks.span, h), jnp.float32),
                pltpu.VMEM((blocks.span, h), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((spans, H, S, h), dq_dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 4, vmem_limit_bytes=blocks.memory
        ),
        name=f"splash_backward_q{blocks.queries}_k{blocks.keys}_span{blocks.span}",
        interpret=interpret,
    )
    dq, dk, dv = kernel(
        jnp.min(first_keys.reshape(steps, blocks.queries), axis=1),
        q,
        k,
        v,
        segment_ids[None, :],
        jnp.broadcast_to(segment_ids[:, None], (S, LANES)),
        log_sum_exp[:, None, :],
        delta[:, None, :],
        grad,
    )
    whole = dq[0]
    for part in dq[1:]:  # additions fuse; a reduction over a leading dim does not
        whole = whole + part
    return whole.astype(q.dtype), dk, dv


def _kernel(
    first,
    q_ref,
    k_ref,
    v_ref,
    query_ids_ref,
    key_ids_ref,
    log_sum_exp_ref,
    delta_ref,
    grad_ref,
    dq_ref,
    dk_ref,
    dv_ref,
    dq_sum,
    dk_sum,
    dv_sum,
    *,
    blocks: Blocks,
    group: int,
    window: int | None,
) -> None:
    """Add one block of queries of one head to the sums of a span. Scores are [keys, queries]."""
    span, member, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    query_start, span_start = step * blocks.queries, span * blocks.span

    @pl.when((member == 0) & (step == 0))
    def _():
        dk_sum[...] = jnp.zeros_like(dk_sum)
        dv_sum[...] = jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)
    start = first[step]
    if window is not None:
        start = jnp.maximum(start, query_start - window + 1)
    low = jnp.maximum(start - span_start, 0) // blocks.keys
    end = jnp.clip(query_start + blocks.queries - span_start, 0, blocks.span)
    high = (end + blocks.keys - 1) // blocks.keys

    def body(number, _):
        offset = pl.multiple_of(number * blocks.keys, blocks.keys)
        rows = pl.ds(offset, blocks.keys)
        q, grad, k, v = q_ref[...], grad_ref[...], k_ref[rows, :], v_ref[rows, :]
        scores = lax.dot_general(k, q, LAST_LAST, preferred_element_type=jnp.float32)
        shape = (blocks.keys, blocks.queries)
        key = lax.broadcasted_iota(jnp.int32, shape, 0) + (span_start + offset)
        query = lax.broadcasted_iota(jnp.int32, shape, 1) + query_start
        key_ids = jnp.tile(key_ids_ref[rows, :], (1, blocks.queries // LANES))
        visible = (key <= query) & (key_ids == query_ids_ref[...])
        if window is not None:
            visible &= key > query - window
        p = jnp.exp(jnp.where(visible, scores, MASKED) - log_sum_exp_ref[...])
        dv_sum[rows, :] += lax.dot_general(
            p.astype(grad.dtype), grad, LAST_FIRST, preferred_element_type=jnp.float32
        )
        dp = lax.dot_general(v, grad, LAST_LAST, preferred_element_type=jnp.float32)
        ds = ((dp - delta_ref[...]) * p).astype(q.dtype)
        dk_sum[rows, :] += lax.dot_general(ds, q, LAST_FIRST, preferred_element_type=jnp.float32)
        dq_sum[...] += lax.dot_general(ds, k, FIRST_FIRST, preferred_element_type=jnp.float32)
        return 0

    lax.fori_loop(low, high, body, 0)
    dq_ref[...] = dq_sum[...].astype(dq_ref.dtype)

    @pl.when((member == group - 1) & (step == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = dk_sum[...].astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].astype(dv_ref.dtype)
