"""The penalty on the distance from the base against autograd in float64."""

from __future__ import annotations

import pytest
import torch

from torchprime.training.backend import StepOptions
from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.optimizer import Parameter
from torchprime.training.regularization.penalty import (
    Anchor,
    Penalty,
    penalty_gradient,
    weighted_squares,
)
from torchprime.training.step import (
    ParameterState,
    StepSums,
    TrainState,
    Update,
    finish_step,
    step_numbers,
)

SHAPE = (5, 3)


def tensors(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.rand(SHAPE, generator=generator) for _ in range(count)]


@pytest.mark.parametrize("with_fisher", [False, True])
def test_value_and_gradient_are_autograds(with_fisher: bool) -> None:
    weight, base, fisher = tensors(3)
    anchor = Anchor(base, fisher if with_fisher else None)
    wide = weight.double().requires_grad_()
    factor = fisher.double() if with_fisher else 1.0
    expected = (factor * (wide - base.double()) ** 2).sum()
    (0.7 * expected).backward()
    assert wide.grad is not None
    torch.testing.assert_close(
        weighted_squares(weight, anchor).double(), expected, rtol=1e-6, atol=0
    )
    found = penalty_gradient(weight, anchor, 0.7).double()
    torch.testing.assert_close(found, wide.grad, rtol=1e-6, atol=1e-9)


def test_it_is_added_after_the_division_and_before_the_norm() -> None:
    """The mean loss per supervised weight, then the penalty once, whatever the batch's size."""
    weight, base, gradient = tensors(3)
    optimizer = AdamW()
    info = Parameter(("w",), SHAPE, weight.dtype)
    slots = {name: torch.zeros(SHAPE) for name in optimizer.slots(info)}
    state = ParameterState(info, weight, slots, None, Anchor(base, None))
    options = StepOptions(step_terms=("l2_sp",), penalty=Penalty("l2_sp", 0.5))
    update = Update(TrainState({"w": state}, torch.zeros(()), torch.zeros(())), optimizer, options)
    value = 0.5 * (weight - base).square().sum()
    norm = (gradient / 4 + (weight - base)).norm()
    sums = StepSums(torch.tensor([12.0]), torch.tensor(4.0), [gradient])
    vector = finish_step(update, sums, torch.tensor(1e-3))
    numbers = step_numbers(vector.tolist(), options)
    assert numbers.terms["l2_sp"] == pytest.approx(value.item(), rel=1e-6)
    assert numbers.loss == pytest.approx(3.0 + value.item(), rel=1e-6)
    assert numbers.grad_norm == pytest.approx(norm.item(), rel=1e-6)


def test_a_bf16_weight_is_compared_in_fp32_by_its_master() -> None:
    """bf16 would round a small step away from the base to none."""
    base = torch.ones(SHAPE, dtype=torch.bfloat16)
    master = base.float() + 1e-3
    info = Parameter(("w",), SHAPE, base.dtype)
    state = ParameterState(info, master.bfloat16(), {}, master, Anchor(base, None))
    assert state.anchor is not None
    assert weighted_squares(state.wide, state.anchor).item() == pytest.approx(15e-6, rel=1e-3)
    assert weighted_squares(state.weight.float(), state.anchor).item() == 0
