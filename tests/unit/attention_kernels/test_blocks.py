"""Block sizes: whatever the length, they divide it, and spans of keys fit their memory."""

from __future__ import annotations

import pytest

from torchprime.attention_kernels.blocks import SPAN_MEMORY, blocks_for


@pytest.mark.parametrize(("head_dim", "itemsize"), [(64, 2), (128, 2), (128, 4), (256, 2)])
def test_blocks_divide_every_sequence(head_dim: int, itemsize: int) -> None:
    for length in [*range(128, 8193, 128), 16384, 32768, 131072]:
        b = blocks_for(length, head_dim, itemsize)
        for whole, part in [
            (length, b.queries), (length, b.span), (length, b.forward_span),
            (b.forward_span, b.span), (b.span, b.keys),
        ]:  # fmt: skip
            assert whole % part == 0 and part % 128 == 0
        assert b.queries <= 1024 and b.keys <= 512


@pytest.mark.parametrize(
    ("head_dim", "itemsize", "span", "forward_span"),
    [(128, 2, 8192, 16384), (128, 4, 4096, 8192), (256, 2, 4096, 8192)],
)
def test_a_span_is_cut_where_the_vector_memory_ends(
    head_dim: int, itemsize: int, span: int, forward_span: int
) -> None:
    """The forward holds keys, values and ids in 128 lanes, twice; the backward holds the gradients
    of keys and values twice and their sums in fp32 too."""
    b = blocks_for(32768, head_dim, itemsize)
    assert (b.span, b.forward_span) == (span, forward_span)
    held = forward_span * (head_dim * 4 * itemsize + 1024)
    with_gradients = span * (head_dim * (8 * itemsize + 8) + 1024)
    assert held <= SPAN_MEMORY < 2 * held
    assert with_gradients <= SPAN_MEMORY < 2 * with_gradients
