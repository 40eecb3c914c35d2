"""The backward of attention as one Pallas kernel for a TPU.

It computes the gradients of queries, keys and values in one pass over the scores, each computed
once (FlashAttention-2, arXiv:2307.08691, algorithm 2). A kv head's keys, values and their fp32
gradients stay in the chip's vector memory while all query heads of its group pass by, so no partial
gradient goes to HBM, keys and values are not repeated, and dq has one rounding. jax's own backward
writes dq once per block of keys, in the dtype of q, and adds them up later.

Keys that no query of a block can see are not computed: later ones, those before its earliest
segment's first position, and those outside the window.

A sequence too long for the vector memory is cut into spans of keys; each gives a partial dq.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from torchprime.attention_kernels.blocks import KERNEL_MEMORY
from torchprime.attention_kernels.kernel_parts import (
    FIRST_FIRST,
    LANES,
    LAST_FIRST,
    LAST_LAST,
    Inputs,
    KernelOptions,
    Tile,
    head_block,
    product,
    read_segments,
    rows_of,
    tile_of,
)


class _Refs(NamedTuple):
    """The kernel's blocks: inputs, outputs, and sums in fp32. `dq_sum` is [h, queries]."""

    q: Any
    k: Any
    v: Any
    query_ids: Any
    key_ids: Any
    log_sum_exp: Any
    out: Any
    grad: Any
    dq: Any
    dk: Any
    dv: Any
    dq_sum: Any
    dk_sum: Any
    dv_sum: Any


def backward(
    given: Inputs, out: jax.Array, log_sum_exp: jax.Array, grad: jax.Array, options: KernelOptions
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the gradients of q, k and v, arranged as these are.

    Args:
        out: the forward's result.
        grad: the gradient by out, arranged as it is.
        log_sum_exp: [B, H, S], fp32, of each query's scores.
    """
    q, k, v, segments = given
    blocks = options.blocks
    B, H, S, h = q.shape
    K, group = k.shape[1], H // k.shape[1]
    spans, steps = S // blocks.span, S // blocks.queries

    def of_queries(row, span, head, member, step, *_):
        return row, head * group + member, step

    def of_results(row, span, head, member, step, *_):
        return row, head * group + member, 0, step

    def of_parts(row, span, head, member, step, *_):
        return span, row, head * group + member, step, 0

    def of_keys(row, span, head, *_):
        return row, head, span

    queries = pl.BlockSpec((None, None, blocks.queries, h), lambda *i: (*of_queries(*i), 0))
    results = pl.BlockSpec((None, None, 1, blocks.queries), of_results)
    parts = pl.BlockSpec((None, None, None, blocks.queries, h), of_parts)
    keys = pl.BlockSpec((None, None, blocks.span, h), lambda *i: (*of_keys(*i), 0))
    values = head_block(blocks.span, h, of_keys)
    mixed = head_block(blocks.queries, h, of_queries)
    query_ids = pl.BlockSpec(
        (None, 1, blocks.queries), lambda row, span, head, member, step, *_: (row, 0, step)
    )
    key_ids = pl.BlockSpec((None, blocks.span, LANES), lambda row, span, *_: (row, span, 0))
    dq_dtype = q.dtype if spans == 1 else jnp.float32
    name = "splash_backward"
    kernel = pl.pallas_call(
        partial(_kernel, tile=tile_of(options), span=blocks.span, group=group),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, spans, K, group, steps),
            in_specs=[queries, keys, values, query_ids, key_ids, results, mixed, mixed],
            out_specs=[parts, keys, values],
            scratch_shapes=[
                pltpu.VMEM((h, blocks.queries), jnp.float32),
                pltpu.VMEM((blocks.span, h), jnp.float32),
                pltpu.VMEM((blocks.span, h), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct((spans, *q.shape), dq_dtype),
            jax.ShapeDtypeStruct(k.shape, k.dtype),
            jax.ShapeDtypeStruct(v.shape, v.dtype),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",) * 5, vmem_limit_bytes=KERNEL_MEMORY
        ),
        name=name,
        interpret=options.interpret,
    )
    first, ids, wide_ids = read_segments(segments, blocks.queries)
    with jax.named_scope(name):
        dq, dk, dv = kernel(first, q, k, v, ids, wide_ids, log_sum_exp[:, :, None], out, grad)
    whole = dq[0]
    for part in dq[1:]:  # additions fuse; a reduction over a leading dim does not
        whole = whole + part
    return whole.astype(q.dtype), dk, dv


def _kernel(first: Any, *refs: Any, tile: Tile, span: int, group: int) -> None:
    """Add one block of queries of one head to the sums of a span."""
    r = _Refs(*refs)
    row, part = pl.program_id(0), pl.program_id(1)
    member, step = pl.program_id(3), pl.program_id(4)

    @pl.when((member == 0) & (step == 0))
    def _():
        r.dk_sum[...] = jnp.zeros_like(r.dk_sum)
        r.dv_sum[...] = jnp.zeros_like(r.dv_sum)

    r.dq_sum[...] = jnp.zeros_like(r.dq_sum)
    parts = r.out[...].astype(jnp.float32) * r.grad[...].astype(jnp.float32)
    delta = jnp.sum(parts.T, axis=0, keepdims=True)

    def body(number, _):
        rows = rows_of(number, tile.keys)
        q, grad, k, v = r.q[...], r.grad[...], r.k[rows, :], r.v[rows, :]
        key_start = part * span + number * tile.keys
        capped = tile.capped(product(k, q, LAST_LAST))
        scores = tile.masked(capped, step, key_start, r.key_ids[rows, :], r.query_ids[...])
        p = jnp.exp(scores - r.log_sum_exp[...])
        r.dv_sum[rows, :] += product(p.astype(grad.dtype), grad, LAST_FIRST)
        dp = product(v, grad, LAST_LAST)
        ds = tile.by_products((dp - delta) * p, capped).astype(q.dtype)
        r.dk_sum[rows, :] += product(ds, q, LAST_FIRST)
        r.dq_sum[...] += product(k, ds, FIRST_FIRST)
        return 0

    low, high = tile.range(first[row, step], step, part * span, span)
    lax.fori_loop(low, high, body, 0)
    r.dq[...] = r.dq_sum[...].T.astype(r.dq.dtype)

    @pl.when((member == group - 1) & (step == pl.num_programs(4) - 1))
    def _():
        r.dk[...] = r.dk_sum[...].astype(r.dk.dtype)
        r.dv[...] = r.dv_sum[...].astype(r.dv.dtype)
