"""One update in plain tensor operations: what it takes into memory, and what it leaves alone."""

from __future__ import annotations

import weakref
from collections.abc import Mapping

import torch
from torch import Tensor

from torchprime.training.backend import StepOptions
from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.optimizer import Parameter
from torchprime.training.step import (
    ParameterState,
    StepSums,
    TrainState,
    Update,
    clipped,
    finish_step,
    step_numbers,
)

COUNT, SHAPE = 6, (4, 3)


def state_of(optimizer: AdamW) -> TrainState:
    torch.manual_seed(0)
    parameters = {}
    for number in range(COUNT):
        weight = torch.randn(SHAPE).bfloat16()
        info = Parameter(("a",), SHAPE, weight.dtype)
        slots = {name: torch.zeros(SHAPE) for name in optimizer.slots(info)}
        parameters[f"w{number}"] = ParameterState(info, weight, slots, weight.float())
    return TrainState(parameters, torch.zeros(()), torch.zeros(()))


class Watching(AdamW):
    """Counts how many wide gradients are alive when it gets one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[weakref.ref[Tensor]] = []
        self.alive: list[int] = []

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        assert gradient.dtype == torch.float32
        self.seen.append(weakref.ref(gradient))
        self.alive.append(sum(each() is not None for each in self.seen))
        return super().update(parameter, weight, gradient, state, lr, step)


def test_wide_gradients_are_not_all_in_memory_at_once() -> None:
    optimizer = Watching()
    gradients = [torch.randn(SHAPE).bfloat16() for _ in range(COUNT)]
    options = StepOptions(max_grad_norm=0.1, max_grad_value=0.01)
    finish_step(
        Update(state_of(optimizer), optimizer, options),
        StepSums(torch.tensor([12.0]), torch.tensor(4.0), gradients),
        torch.tensor(1e-3),
    )
    assert len(optimizer.alive) == COUNT and max(optimizer.alive) <= 2


def test_a_scale_of_the_gradients_is_a_factor_of_them() -> None:
    """FSDP2 averages gradients; the scale turns the mean into the sum."""
    results = []
    for scale in (1.0, 8.0):
        optimizer = AdamW()
        state = state_of(optimizer)
        gradients = [torch.full(SHAPE, 0.5 * (n + 1) / scale) for n in range(COUNT)]
        numbers = finish_step(
            Update(state, optimizer, StepOptions(max_grad_norm=1.0)),
            StepSums(torch.tensor([12.0]), torch.tensor(4.0), gradients),
            torch.tensor(1e-3),
            gradient_scale=scale,
        )
        squares = sum(12 * (0.5 * (n + 1) / 4) ** 2 for n in range(COUNT))
        torch.testing.assert_close(numbers[:3], torch.tensor([3.0, squares**0.5, 4.0]))
        results.append([p.master for p in state.parameters.values()])
    for one, other in zip(*results, strict=True):
        assert one is not None and other is not None
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_terms_of_the_loss_are_divided_and_sources_are_not() -> None:
    optimizer = AdamW()
    options = StepOptions(num_sources=2, loss_terms=("a", "b"))
    vector = finish_step(
        Update(state_of(optimizer), optimizer, options),
        StepSums(
            torch.tensor([12.0, 2.0, 6.0, 5.0, 7.0]),
            torch.tensor(4.0),
            [torch.ones(SHAPE)] * COUNT,
        ),
        torch.tensor(1e-3),
    )
    numbers = step_numbers(vector.tolist(), options)
    assert (numbers.loss, numbers.terms) == (3.0, {"a": 0.5, "b": 1.5})
    assert numbers.source_loss_sums == (5.0, 7.0)


def test_clipping_is_torchs_two_functions_in_a_row() -> None:
    torch.manual_seed(0)
    grads = [torch.randn(shape) for shape in ((6, 5), (7,), (4, 3))]
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in grads]
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    norm = torch.nn.utils.clip_grad_norm_(params, 2.0)
    torch.nn.utils.clip_grad_value_(params, 0.3)
    ours = list(clipped(grads, norm, 2.0, 0.3))
    for p, g in zip(params, ours, strict=True):
        torch.testing.assert_close(g, p.grad)
    assert next(clipped(grads, norm, None, None)) is grads[0]
