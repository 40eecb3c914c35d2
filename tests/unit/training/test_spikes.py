"""Spikes against a float64 loop over the same losses, and what a skipped update changes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from torchprime.training.backend import StepOptions
from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.optimizer import Parameter
from torchprime.training.spikes import (
    SEEN,
    SKIPPED,
    STATISTICS,
    STREAK,
    Spike,
    SpikeOptions,
    first_state,
    judge,
    spikes_in,
)
from torchprime.training.step import (
    ParameterState,
    StepSums,
    TrainState,
    Update,
    finish_step,
    step_numbers,
)

WINDOW, DEVIATIONS = 10, 4.0


def series(count: int) -> np.ndarray:
    """Falling losses and norms with noise; some jump, and two in a row."""
    random = np.random.default_rng(0)
    values = np.stack([3 * 0.99 ** np.arange(count), 1 + 0 * np.arange(count)], axis=1)
    values += 0.05 * random.standard_normal(values.shape)
    values[[3, 25, 40, 41], 0] += 4  # the first is within the warm-up
    values[60, 1] = 30.0
    return values.astype(np.float32)


def plain(values: np.ndarray, skip: bool) -> tuple[list[int], np.ndarray]:
    """Return the 1-based steps of spikes, and [mean, mean, variance, variance] at the end."""
    mean, variance, seen, found = np.zeros(2), np.zeros(2), 0, []
    for step, now in enumerate(values.astype(np.float64), start=1):
        spike = seen >= WINDOW and bool((now > mean + DEVIATIONS * np.sqrt(variance)).any())
        if spike:
            found.append(step)
        if spike and skip:
            continue
        seen += 1
        share = 1 / min(seen, WINDOW)
        change = now - mean
        mean = mean + share * change
        variance = (1 - share) * (variance + share * change**2)
    return found, np.concatenate([mean, variance])


@pytest.mark.parametrize("skip", [True, False])
def test_decisions_are_those_of_a_plain_loop(skip: bool) -> None:
    options = SpikeOptions(WINDOW, DEVIATIONS, skip, ring=7)
    values = series(80)
    state, found = first_state(options, None), []
    for step, (loss, norm) in enumerate(torch.from_numpy(values), start=1):
        spike, state = judge(state, loss, norm, torch.tensor(float(step)), options)
        if spike:
            found.append(step)
            last = spikes_in(state.tolist())[-1]
            assert last.step == step and last.loss == loss and last.grad_norm == norm
    expected, statistics = plain(values, skip)
    assert found == expected and {26, 41, 61} <= set(found)
    np.testing.assert_allclose(state[:4].numpy(), statistics, rtol=1e-4)
    assert state[SKIPPED] == (len(found) if skip else 0)
    assert state[SEEN] == 80 - state[SKIPPED] and state[STREAK] == 0


def test_the_first_updates_have_the_exact_mean_and_variance() -> None:
    options = SpikeOptions(50, 1.0, True, ring=1)
    state, values = first_state(options, None), torch.randn(20, 2).abs()
    for step, (loss, norm) in enumerate(values, start=1):
        state = judge(state, loss, norm, torch.tensor(float(step)), options).state
    torch.testing.assert_close(state[:2], values.mean(dim=0))
    torch.testing.assert_close(state[2:4], values.var(dim=0, correction=0))


def test_a_ring_of_another_size_keeps_the_newest() -> None:
    old = SpikeOptions(5, 3.0, True, ring=4)
    state = first_state(old, None)
    state[:STATISTICS] = torch.arange(float(STATISTICS))
    for step in (5, 6, 8):
        rows = state[STATISTICS:].view(-1, 5)
        rows[step % 4] = torch.tensor([step, 1.0, 2.0, 3.0, 4.0])
    smaller = first_state(SpikeOptions(5, 3.0, True, ring=2), state)
    assert smaller[:STATISTICS].tolist() == list(range(STATISTICS))
    assert [s.step for s in spikes_in(smaller.tolist())] == [5, 8]
    assert spikes_in(first_state(SpikeOptions(5, 3.0, True, ring=9), state).tolist())[0] == Spike(
        5, 1.0, 2.0, 3.0, 4.0
    )


def gradients(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    found = [torch.randn(4, 3, generator=generator) for _ in range(count)]
    for bad in (6, 7):
        found[bad] *= 100
    return found


def test_skipped_updates_leave_what_torch_has_without_them() -> None:
    """Weights, moments and the bias correction; the learning rates are those of the run's steps."""
    options = StepOptions(
        max_grad_norm=None, spikes=SpikeOptions(window=4, deviations=5.0, skip=True, ring=3)
    )
    assert options.spikes is not None
    optimizer, weight = AdamW(weight_decay=0.1), torch.ones(4, 3)
    info = Parameter(("a.weight",), (4, 3), torch.float32)
    slots = {name: torch.zeros(4, 3) for name in optimizer.slots(info)}
    state = TrainState({"w": ParameterState(info, weight, slots, None)}, torch.zeros(()),
                       torch.zeros(()), first_state(options.spikes, None))  # fmt: skip
    theirs = torch.nn.Parameter(torch.ones(4, 3))
    reference = torch.optim.AdamW([theirs], weight_decay=0.1)
    numbers = []
    for step, gradient in enumerate(gradients(12)):
        lr = 0.1 * (1 - step / 12)
        sums = StepSums(torch.tensor([2.0]), torch.tensor(1.0), [gradient])
        vector = finish_step(Update(state, optimizer, options), sums, torch.tensor(lr))
        numbers.append(step_numbers(vector.tolist(), options))
        if step not in (6, 7):
            theirs.grad, reference.param_groups[0]["lr"] = gradient.clone(), lr
            reference.step()
    assert state.step == 12 and state.bad_step == 0
    torch.testing.assert_close(weight, theirs.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slots["exp_avg"], reference.state[theirs]["exp_avg"])
    assert [[s.step for s in n.spikes] for n in numbers[6:11]] == [
        [7], [7, 8], [7, 8], [8], [],
    ]  # fmt: skip
    assert [n.spikes_in_a_row for n in numbers[5:9]] == [0, 1, 2, 0]
    assert numbers[0].source_loss_sums == () and numbers[0].terms == {}


def test_a_step_that_is_not_finite_is_no_spike() -> None:
    options = StepOptions(spikes=SpikeOptions(window=2, deviations=3.0, skip=True, ring=4))
    assert options.spikes is not None
    optimizer, weight = AdamW(), torch.ones(2)
    info = Parameter(("a.weight",), (2,), torch.float32)
    slots = {name: torch.zeros(2) for name in optimizer.slots(info)}
    state = TrainState({"w": ParameterState(info, weight, slots, None)}, torch.zeros(()),
                       torch.zeros(()), first_state(options.spikes, None))  # fmt: skip
    for gradient in (1.0, 1.1, float("inf"), 1.0):
        sums = StepSums(torch.tensor([2.0]), torch.tensor(1.0), [torch.full((2,), gradient)])
        vector = finish_step(Update(state, optimizer, options), sums, torch.tensor(0.1))
    found = step_numbers(vector.tolist(), options)
    assert found.bad_step == 3 and found.spikes == ()
    assert state.spikes is not None and torch.isfinite(state.spikes).all()
    assert state.spikes[SEEN] == 2
