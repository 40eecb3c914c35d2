"""The forward of attention as one Pallas kernel for a TPU.

Softmax is accumulated over blocks of keys (FlashAttention, arXiv:2205.14135). The keys and values
of a kv head stay in the chip's vector memory while all query heads of its group pass by. Unlike
jax's splash kernel it computes no block of keys that lies before the segments of its queries, and
writes one log-sum-exp for each query instead of 128 copies.

A sequence too long for the vector memory is cut into spans of keys, which follow one another in
the innermost dimension of the grid.
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
    LAST_LAST,
    MASKED,
    Inputs,
    KernelOptions,
    Tile,
    head_block,
    head_shape,
    product,
    read_segments,
    rows_of,
    tile_of,
)


class _Refs(NamedTuple):
    """The kernel's blocks: inputs, outputs, and memory that stays. `mixed` is [h, queries]."""

    q: Any
    k: Any
    v: Any
    query_ids: Any
    key_ids: Any
    out: Any
    log_sum_exp: Any
    top: Any
    total: Any
    mixed: Any


def forward(given: Inputs, options: KernelOptions) -> tuple[jax.Array, jax.Array]:
    """Return the result, arranged as `in_rows` says, and each query's log-sum-exp [B, H, S] in
    fp32."""
    q, k, v, segments = given
    blocks = options.blocks
    B, H, S, h = q.shape
    K, group = k.shape[1], H // k.shape[1]
    span = blocks.forward_span

    def of_queries(row, head, member, step, *_):
        return row, head * group + member, step

    def of_results(row, head, member, step, *_):
        return row, head * group + member, 0, step

    def of_keys(row, head, _, __, part, *___):
        return row, head, part

    queries = pl.BlockSpec((None, None, blocks.queries, h), lambda *i: (*of_queries(*i), 0))
    results = pl.BlockSpec((None, None, 1, blocks.queries), of_results)
    keys = pl.BlockSpec((None, None, span, h), lambda *i: (*of_keys(*i), 0))
    query_ids = pl.BlockSpec(
        (None, 1, blocks.queries), lambda row, _, __, step, *___: (row, 0, step)
    )
    key_ids = pl.BlockSpec((None, span, LANES), lambda row, _, __, ___, part, *____: (row, part, 0))
    name = "splash_forward"
    kernel = pl.pallas_call(
        partial(_kernel, tile=tile_of(options), span=span),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, K, group, S // blocks.queries, S // span),
            in_specs=[queries, keys, head_block(span, h, of_keys), query_ids, key_ids],
            out_specs=[head_block(blocks.queries, h, of_queries), results],
            scratch_shapes=[
                pltpu.VMEM((1, blocks.queries), jnp.float32),
                pltpu.VMEM((1, blocks.queries), jnp.float32),
                pltpu.VMEM((h, blocks.queries), jnp.float32),
            ],
        ),
        out_shape=[
            jax.ShapeDtypeStruct(head_shape(B, H, S, h), q.dtype),
            jax.ShapeDtypeStruct((B, H, 1, S), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel",) * 4 + ("arbitrary",),
            vmem_limit_bytes=KERNEL_MEMORY,
        ),
        name=name,
        interpret=options.interpret,
    )
    first, ids, wide_ids = read_segments(segments, blocks.queries)
    with jax.named_scope(name):
        out, log_sum_exp = kernel(first, q, k, v, ids, wide_ids)
    return out, log_sum_exp[:, :, 0]


def _kernel(first: Any, *refs: Any, tile: Tile, span: int) -> None:
    """Add a span of keys to one block of queries of one head."""
    r = _Refs(*refs)
    row, step, part = pl.program_id(0), pl.program_id(3), pl.program_id(4)

    @pl.when(part == 0)
    def _():
        r.top[...] = jnp.full_like(r.top, MASKED)
        r.total[...] = jnp.zeros_like(r.total)
        r.mixed[...] = jnp.zeros_like(r.mixed)

    def body(number, _):
        rows = rows_of(number, tile.keys)
        scores = tile.capped(product(r.k[rows, :], r.q[...], LAST_LAST))
        key_start = part * span + number * tile.keys
        scores = tile.masked(scores, step, key_start, r.key_ids[rows, :], r.query_ids[...])
        # A block of masked keys gives ones here; a query's own key comes later and cancels them.
        new_top = jnp.maximum(r.top[...], jnp.max(scores, axis=0, keepdims=True))
        p = jnp.exp(scores - new_top)
        kept = jnp.exp(r.top[...] - new_top)
        r.top[...] = new_top
        r.total[...] = r.total[...] * kept + jnp.sum(p, axis=0, keepdims=True)
        v = r.v[rows, :]
        r.mixed[...] = r.mixed[...] * kept + product(v, p.astype(v.dtype), FIRST_FIRST)
        return 0

    low, high = tile.range(first[row, step], step, part * span, span)
    lax.fori_loop(low, high, body, 0)

    @pl.when(part == pl.num_programs(4) - 1)
    def _():
        r.out[...] = (r.mixed[...] / r.total[...]).T.astype(r.out.dtype)
        r.log_sum_exp[...] = r.top[...] + jnp.log(r.total[...])
