"""Block sizes of the attention kernels, by length, width of a head and dtype.

Found by compiling for v5e, v6e and v5p with libtpu 0.0.21: docs/tpu.md, "Attention", has what fits.
"""

from __future__ import annotations

from dataclasses import dataclass

# The kernels work in tiles of this many positions; a sequence must be a multiple.
KERNEL_MULTIPLE = 128
MIB = 2**20
# What a span of keys may take of the vector memory in the backward, and all that it may take (a chip
# has 64 or 128 MiB). The rest are blocks of queries and products of [keys, queries] in fp32.
SPAN_MEMORY = 32 * MIB
BACKWARD_MEMORY = 48 * MIB


@dataclass(frozen=True)
class Limits:
    """Largest blocks of a generation of chips, in positions.

    Attributes:
        forward: queries and keys of a block of jax's forward.
        forward_product: keys of one product in it.
        backward_queries: queries of a block of the backward.
        backward_keys: keys of one product in it.
    """

    forward: int = 1024
    forward_product: int = 512
    backward_queries: int = 1024
    backward_keys: int = 512


# By the name that torch_xla gives a chip.
LIMITS = {"v6e": Limits(forward=2048)}


@dataclass(frozen=True)
class Blocks:
    """Sizes of the kernels' pieces, in positions; multiples of a tile.

    Attributes:
        forward: queries and keys of a block of the forward; divides the sequence.
        forward_product: keys of one product in it; divides `forward`.
        queries: queries of a block of the backward; divides the sequence.
        keys: keys of one product in it; divides the span.
        span: keys whose gradients are in vector memory at the same time; divides the sequence.
        memory: vector memory that the backward may use, in bytes.
    """

    forward: int
    forward_product: int
    queries: int
    keys: int
    span: int
    memory: int = BACKWARD_MEMORY


def blocks_for(length: int, head_dim: int, itemsize: int, limits: Limits) -> Blocks:
    """Return the largest blocks within the limits that divide a sequence evenly.

    Args:
        itemsize: bytes of one value of queries, keys and values.

    Examples:
        >>> sizes = blocks_for(8192, 128, 2, Limits())
        >>> sizes.forward, sizes.forward_product, sizes.queries, sizes.keys, sizes.span
        (1024, 512, 1024, 512, 8192)
        >>> blocks_for(32768, 128, 2, Limits()).span, blocks_for(384, 64, 2, Limits()).queries
        (8192, 384)
    """
    forward = largest_divisor(length, limits.forward)
    span = largest_divisor(length, SPAN_MEMORY // _bytes_per_key(head_dim, itemsize))
    return Blocks(
        forward,
        largest_divisor(forward, limits.forward_product),
        largest_divisor(length, limits.backward_queries),
        largest_divisor(span, limits.backward_keys),
        span,
    )


def _bytes_per_key(head_dim: int, itemsize: int) -> int:
    """Return the vector memory of one key in the backward: key, value and both gradients, twice
    since the next ones are loaded meanwhile; both sums in fp32; segment ids in 128 lanes, twice."""
    wide = -(-head_dim // 128) * 128
    return wide * (4 * 2 * itemsize + 2 * 4) + 2 * 128 * 4


def largest_divisor(length: int, limit: int) -> int:
    """Return the largest number of whole tiles within the limit that divides the length."""
    tiles = range(KERNEL_MULTIPLE, min(length, limit) + 1, KERNEL_MULTIPLE)
    return max(tile for tile in tiles if length % tile == 0)
