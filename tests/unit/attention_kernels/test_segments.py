"""The segments as the kernels read them."""

from __future__ import annotations

import torch

from torchprime.attention_kernels.segments import with_first_positions


def test_each_position_has_the_first_one_of_its_segment() -> None:
    ids = torch.tensor([[1, 1, 2, 2, 0], [3, 0, 0, 3, 3]])
    first = [[0, 0, 2, 2, 4], [0, 1, 1, 0, 0]]
    pairs = zip(ids.tolist(), first, strict=True)
    assert with_first_positions(ids).tolist() == [list(pair) for pair in pairs]
