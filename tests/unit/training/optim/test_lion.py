"""Lion against the paper's algorithm in double precision."""

from __future__ import annotations

import torch
from updates import LR, ours, same, small_model

from torchprime.training.optim.lion import Lion

BETA1, BETA2, DECAY = 0.9, 0.99, 0.1


def test_lion_is_the_papers_algorithm() -> None:
    weights, gradients = small_model()
    expected, near = {}, {}
    for name, weight in weights.items():
        w, m = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
        decay = 0.0 if "norm" in name else DECAY
        near[name] = torch.zeros_like(weight, dtype=torch.bool)
        for grads in gradients:
            g = grads[name].double()
            c = BETA1 * m + (1 - BETA1) * g
            w = w - LR * (torch.sign(c) + decay * w)
            m = BETA2 * m + (1 - BETA2) * g
            near[name] |= c.abs() < 1e-6 * (BETA1 * m.abs() + g.abs())
        expected[name] = w.float()
    found = ours(Lion((BETA1, BETA2), DECAY), weights, gradients)
    # Where momentum and gradient cancel to their last digits, the sign is one of rounding.
    cancelled = sum(int(mask.sum()) for mask in near.values())
    assert cancelled < 1e-3 * sum(mask.numel() for mask in near.values())
    for name, mask in near.items():
        found[name] = torch.where(mask, expected[name], found[name])
    same(found, expected, weights)
