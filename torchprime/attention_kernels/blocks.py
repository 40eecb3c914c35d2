"""Block sizes of the attention kernels, by length, width of a head and dtype.

Found by compiling for v5e, v6e and v5p with libtpu 0.0.21: docs/tpu.md, "Attention", has what fits.
"""

from __future__ import annotations

from dataclasses import dataclass

# The kernels work in tiles of this many positions; a sequence must be a multiple.
KERNEL_MULTIPLE = 128
MIB = 2**20
# Of the vector memory, of which a chip has 64 or 128 MiB: what a span of keys may take, and all
# that a kernel may take. The rest are blocks of queries and products of [keys, queries] in fp32.
SPAN_MEMORY = 32 * MIB
KERNEL_MEMORY = 48 * MIB
QUERIES, KEYS = 1024, 512


@dataclass(frozen=True)
class Blocks:
    """Sizes of the kernels' pieces, in positions; multiples of a tile.

    Attributes:
        queries: queries of a block; divides the sequence.
        keys: keys of one product; divides the spans.
        forward_span: keys that are in vector memory at the same time; divides the sequence.
        span: the same in the backward, with their gradients.
    """

    queries: int
    keys: int
    forward_span: int
    span: int


def blocks_for(length: int, head_dim: int, itemsize: int) -> Blocks:
    """Return the largest blocks that divide a sequence evenly.

    Args:
        itemsize: bytes of one value of queries, keys and values.

    Examples:
        >>> sizes = blocks_for(32768, 128, 2)
        >>> sizes.queries, sizes.keys, sizes.forward_span, sizes.span
        (1024, 512, 16384, 8192)
        >>> blocks_for(384, 64, 2).queries
        384
    """
    wide = -(-head_dim // 128) * 128
    # Keys and values, and segment ids in 128 lanes; twice, since the next are loaded meanwhile.
    forward = 2 * (wide * 2 * itemsize + 128 * 4)
    # And the gradients that are written, and their sums in fp32.
    backward = forward + wide * (2 * 2 * itemsize + 2 * 4)
    span = largest_divisor(length, SPAN_MEMORY // backward)
    return Blocks(
        queries=largest_divisor(length, QUERIES),
        keys=largest_divisor(span, KEYS),
        forward_span=_multiple_of(span, length, SPAN_MEMORY // forward),
        span=span,
    )


def largest_divisor(length: int, limit: int) -> int:
    """Return the largest number of whole tiles within the limit that divides the length."""
    tiles = range(KERNEL_MULTIPLE, min(length, limit) + 1, KERNEL_MULTIPLE)
    return max(tile for tile in tiles if length % tile == 0)


def _multiple_of(span: int, length: int, limit: int) -> int:
    """Return the largest multiple of a span within the limit that divides the length."""
    return max(n for n in range(span, min(length, limit) + 1, span) if length % n == 0)
