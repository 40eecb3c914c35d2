"""Attention scores over the cache, compared with a sum in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from torchprime.generation.cache import by_product, by_sums


@pytest.mark.parametrize("head_dim", [16, 32, 40, 96])  # summed at once, and in stages of 32
@pytest.mark.parametrize("match", [by_product, by_sums])
def test_scores(match: Callable[[Tensor, Tensor], Tensor], head_dim: int) -> None:
    g = torch.Generator().manual_seed(head_dim)
    q = torch.randn(2, 3, 4, head_dim, generator=g)
    keys = torch.randn(2, 3, 7, head_dim, generator=g)
    expected = torch.einsum("bkgh,bkch->bkgc", q.double(), keys.double())
    torch.testing.assert_close(match(q, keys).double(), expected, rtol=0, atol=1e-5)


def test_sums_of_bf16_are_rounded_once() -> None:
    """512 and many small numbers: in bf16 each would be lost."""
    q, keys = torch.ones(1, 1, 1, 64).bfloat16(), torch.full((1, 1, 1, 64), 0.5).bfloat16()
    keys[..., 0] = 512
    assert by_sums(q, keys).item() == 512 + 63 * 0.5
