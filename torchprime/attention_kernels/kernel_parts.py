"""Parts of both kernels: their inputs, and the keys that a block of queries sees.

Scores are computed as [keys, queries], so that one value for each query (its log-sum-exp, its
segment) is a row, which lies along the lanes as it does in HBM.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from torchprime.attention_kernels.blocks import Blocks

LANES = 128
# exp(MASKED - x) is 0 for a score x, and MASKED is finite, so that nothing is NaN.
MASKED = -0.7 * float(jnp.finfo(jnp.float32).max)
# Contractions: over both last dims, last with first, first with first.
LAST_LAST = (((1,), (1,)), ((), ()))
LAST_FIRST = (((1,), (0,)), ((), ()))
FIRST_FIRST = (((0,), (0,)), ((), ()))


class Inputs(NamedTuple):
    """The arrays that both kernels read. They are jax's in the kernels and torch's outside.

    Attributes:
        q: [B, H, S, h], scaled.
        k: [B, K, S, h], K divides H.
        v: values of K heads, arranged as `in_rows` says.
        segments: [B, 2, S], int32: ids, and the first position of each position's segment.
    """

    q: Any
    k: Any
    v: Any
    segments: Any


@dataclass(frozen=True)
class KernelOptions:
    """Settings of both kernels.

    Attributes:
        window: positions that a query sees, its own among them; None for all.
        softcap: of the scores; None for none.
        interpret: run by the interpreter, on any device.
    """

    blocks: Blocks
    window: int | None = None
    softcap: float | None = None
    interpret: bool = False


def in_rows(head_dim: int) -> bool:
    """Return True if values, results and their gradients are [B, S, heads * h], as the products
    before and after attention have them; else they are [B, heads, S, h].

    A block of one head is whole tiles in such an array only if heads are whole lanes wide. Queries
    and keys come from the rotary embedding, which works on [B, heads, S, h] anyway.
    """
    return head_dim % LANES == 0


def head_block(size: int, head_dim: int, place: Callable[..., tuple[Any, Any, Any]]) -> Any:
    """Return the specification of a block of one head, in an array arranged as `in_rows` says.

    Args:
        size: positions of a block.
        place: the numbers of row, head and block of positions, from the grid's indices.
    """
    if not in_rows(head_dim):
        return pl.BlockSpec((None, None, size, head_dim), lambda *i: (*place(*i), 0))

    def in_row(*indices: Any) -> tuple[Any, Any, Any]:
        row, head, block = place(*indices)
        return row, block, head

    return pl.BlockSpec((None, size, head_dim), in_row)


def head_shape(rows: int, heads: int, length: int, head_dim: int) -> tuple[int, ...]:
    """Return the shape of an array arranged as `in_rows` says."""
    if in_rows(head_dim):
        return rows, length, heads * head_dim
    return rows, heads, length, head_dim


class Tile(NamedTuple):
    """Scores that are computed at once.

    Attributes:
        queries: queries of a block.
        keys: keys of a product.
        window: positions that a query sees, its own among them; None for all.
        softcap: of the scores; None for none.
    """

    queries: int
    keys: int
    window: int | None
    softcap: float | None

    def range(self, first: Any, step: Any, span_start: Any, span: int) -> tuple[Any, Any]:
        """Return the products of a span that a block of queries needs, as (low, high).

        Left out are keys after the last query, before the first key of any query's segment, and
        outside the window of all.

        Args:
            first: the first position of any segment in the block of queries.
            step: number of the block of queries.
        """
        start = step * self.queries
        if self.window is not None:
            first = jnp.maximum(first, start - self.window + 1)
        # Both are positive. Python's division looks at signs, and newer jax lowers that only for a
        # chip that it knows.
        keys = jnp.int32(self.keys)
        low = lax.div(jnp.maximum(first - span_start, 0), keys)
        end = jnp.clip(start + self.queries - span_start, 0, span)
        return low, lax.div(end + self.keys - 1, keys)

    def capped(self, scores: jax.Array) -> jax.Array:
        """Return softcap * tanh(scores / softcap), before the mask."""
        if self.softcap is None:
            return scores
        return self.softcap * jnp.tanh(scores / self.softcap)

    def by_products(self, gradient: jax.Array, capped: jax.Array) -> jax.Array:
        """Return a gradient by the products of queries and keys, from that by the capped scores.
        The derivative of the cap is 1 - tanh(scores / softcap)^2."""
        if self.softcap is None:
            return gradient
        tanh = capped / self.softcap
        return gradient * (1.0 - tanh * tanh)

    def masked(
        self, scores: jax.Array, step: Any, key_start: Any, key_ids: jax.Array, ids: jax.Array
    ) -> jax.Array:
        """Return the scores [keys, queries] with MASKED where the query does not see the key.

        Args:
            key_start: position of the first key.
            key_ids: segment of each key, [keys, LANES], equal along the lanes.
            ids: segment of each query, [1, queries].
        """
        key = lax.broadcasted_iota(jnp.int32, scores.shape, 0) + key_start
        query = lax.broadcasted_iota(jnp.int32, scores.shape, 1) + step * self.queries
        visible = key <= query
        visible &= jnp.tile(key_ids, (1, self.queries // LANES)) == ids
        if self.window is not None:
            visible &= key > query - self.window
        return jnp.where(visible, scores, MASKED)


class Segments(NamedTuple):
    """The segments, as the kernels read them.

    Attributes:
        first: [B, blocks of queries], the first position of any segment in a block.
        queries: [B, 1, S].
        keys: [B, S, LANES].
    """

    first: jax.Array
    queries: jax.Array
    keys: jax.Array


def tile_of(options: KernelOptions) -> Tile:
    """Return the scores that are computed at once."""
    blocks = options.blocks
    return Tile(blocks.queries, blocks.keys, options.window, options.softcap)


def read_segments(segments: jax.Array, queries: int) -> Segments:
    """Return the segments from their ids and first positions, [B, 2, S].

    Args:
        queries: queries of a block.
    """
    ids, first = segments[:, 0], segments[:, 1]
    rows, length = ids.shape
    wide = jnp.broadcast_to(ids[:, :, None], (rows, length, LANES))
    blocks = first.reshape(rows, length // queries, queries)
    return Segments(jnp.min(blocks, axis=2), ids[:, None, :], wide)


def product(left: jax.Array, right: jax.Array, contraction: Any) -> jax.Array:
    """Return a product accumulated in fp32."""
    return lax.dot_general(left, right, contraction, preferred_element_type=jnp.float32)


def rows_of(number: Any, size: int) -> Any:
    """Return the slice of a block by its number."""
    return pl.ds(pl.multiple_of(number * size, size), size)
