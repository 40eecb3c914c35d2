"""AdamW against torch's."""

from __future__ import annotations

import pytest
import torch
from updates import LR, ours, same, small_model, theirs

from torchprime.training.optim.adamw import AdamW


@pytest.mark.parametrize("betas", [(0.8, 0.95), (0.0, 0.9)], ids=["both", "no-momentum"])
def test_adamw_is_torchs(betas: tuple[float, float]) -> None:
    weights, gradients = small_model()
    expected = theirs(
        lambda groups: torch.optim.AdamW(groups, lr=LR, betas=betas, eps=1e-6), weights, gradients
    )
    same(ours(AdamW(betas, 1e-6, 0.1), weights, gradients), expected, weights)
