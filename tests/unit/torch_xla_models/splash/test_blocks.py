"""Block sizes: whatever the length, they divide it, and the backward fits its memory."""

from __future__ import annotations

import pytest

from torchprime.torch_xla_models.splash.blocks import LIMITS, SPAN_MEMORY, Limits, blocks_for


@pytest.mark.parametrize("limits", [Limits(), LIMITS["v6e"]], ids=["others", "v6e"])
@pytest.mark.parametrize(("head_dim", "itemsize"), [(64, 2), (128, 2), (128, 4), (256, 2)])
def test_blocks_divide_every_sequence(head_dim: int, itemsize: int, limits: Limits) -> None:
    for length in [*range(128, 8193, 128), 16384, 32768, 131072]:
        b = blocks_for(length, head_dim, itemsize, limits)
        for whole, part in [
            (length, b.forward), (b.forward, b.forward_product), (length, b.queries),
            (length, b.span), (b.span, b.keys),
        ]:  # fmt: skip
            assert whole % part == 0 and part % 128 == 0
        assert b.forward <= limits.forward and b.queries <= limits.backward_queries


def test_a_span_is_cut_where_the_vector_memory_ends() -> None:
    """Keys, values and their gradients twice in their dtype, both sums in fp32, ids in 128 lanes
    twice."""
    for head_dim, itemsize, span in [(128, 2, 8192), (128, 4, 4096), (256, 2, 4096)]:
        assert blocks_for(32768, head_dim, itemsize, Limits()).span == span
        used = span * (head_dim * (8 * itemsize + 8) + 1024)
        assert used <= SPAN_MEMORY < 2 * used
