"""The average of the weights against torch's AveragedModel."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from torchprime.training.backend import StepOptions
from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.ema import EMA, WithEma
from torchprime.training.optim.optimizer import Optimizer, Parameter
from torchprime.training.optim.sgd import Sgd
from torchprime.training.step import (
    ParameterState,
    StepSums,
    TrainState,
    Update,
    finish_step,
)


@pytest.mark.parametrize("decay", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_torchs_average(decay: float, dtype: torch.dtype) -> None:
    """Over 30 updates; of bf16 weights the fp32 master copies are averaged."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    wide = model.weight.detach().clone().to(dtype).float()
    model.weight.data.copy_(wide)
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    reference = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    optimizer = WithEma(AdamW(weight_decay=0.1), decay)
    state = state_of(optimizer, wide.to(dtype))
    parameter = state.parameters["w"]
    for _ in range(30):
        gradient = torch.randn(3, 5)
        model.weight.grad = gradient.clone()
        reference.step()
        theirs.update_parameters(model)
        sums = StepSums(torch.tensor([1.0]), torch.tensor(1.0), [gradient])
        finish_step(Update(state, optimizer, StepOptions()), sums, torch.tensor(0.05))
    torch.testing.assert_close(parameter.slots[EMA], theirs.module.get_parameter("weight").detach())
    assert (parameter.slots[EMA] != parameter.wide).any() or decay == 0


def test_a_bad_update_does_not_enter() -> None:
    optimizer = WithEma(Sgd(0.0, False, 0.0), 0.9)
    state = state_of(optimizer, torch.ones(2))
    for gradient in (1.0, 2.0, float("nan"), 1.0):
        sums = StepSums(torch.tensor([1.0]), torch.tensor(1.0), [torch.full((2,), gradient)])
        finish_step(Update(state, optimizer, StepOptions()), sums, torch.tensor(0.1))
    # 1 -> 0.9 -> 0.7; the average of the first is itself
    torch.testing.assert_close(
        state.parameters["w"].slots[EMA], torch.full((2,), 0.9 * 0.9 + 0.1 * 0.7)
    )


def state_of(optimizer: Optimizer, weight: torch.Tensor) -> TrainState:
    info = Parameter(("a.weight",), tuple(weight.shape), weight.dtype)
    slots = {name: torch.zeros(weight.shape) for name in optimizer.slots(info)}
    master = None if weight.dtype == torch.float32 else weight.float()
    parameter = ParameterState(info, weight, slots, master)
    return TrainState({"w": parameter}, torch.zeros(()), torch.zeros(()))
