"""Loops on the device that start where the data says."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch_xla
from torch import Tensor

from torchprime.torch_xla_models.layers.loops import device_loop, late_loop


def body(carry: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    total, factor = carry
    return [total + factor * xs[0].sum(), factor], [xs[0] * factor + 1]


def test_a_late_loop_runs_the_last_rounds() -> None:
    device = torch_xla.device()
    x = torch.arange(12, dtype=torch.float32).view(4, 3)
    for first in (0, 1, 3, 4):
        given = [torch.zeros(()).to(device), torch.tensor(2.0).to(device)], [x.to(device)]
        (total, _), (ys,) = late_loop(body, *given, torch.tensor(first).to(device))
        assert total.item() == 2 * x[first:].sum().item()
        expected = torch.cat([torch.zeros(first, 3), x[first:] * 2 + 1])
        assert torch.equal(ys.cpu(), expected)


def test_a_late_loop_inside_a_loop() -> None:
    device = torch_xla.device()
    x = torch.arange(12, dtype=torch.float32).view(4, 3).to(device)
    firsts = torch.tensor([3, 0]).to(device)

    def outer(carry: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        total, factor, values = carry
        (more, _), _ = late_loop(body, [torch.zeros_like(total), factor], [values], xs[0])
        return [total + more, factor, values], []

    zero, two = torch.zeros(()).to(device), torch.tensor(2.0).to(device)
    (total, *_), _ = device_loop(outer, [zero, two, x], [firsts])
    assert total.item() == 2 * (9 + 10 + 11) + 2 * 66
