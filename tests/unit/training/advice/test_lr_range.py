"""The suggested learning rates, on losses whose best rate is known."""

from __future__ import annotations

import math

import pytest

from torchprime.errors import DataError
from torchprime.training.advice.lr_range import find_range, smooth
from torchprime.training.advice.lr_range_figure import draw_range

STEPS = 200
RATES = [1e-7 * 10 ** (7 * n / (STEPS - 1)) for n in range(STEPS)]


def valley(rate: float) -> float:
    """A loss that falls most steeply at 1e-4 and is lowest near 1e-2."""
    place = math.log10(rate)
    return 3 - 2 / (1 + math.exp(-3 * (place + 4))) + max(0.0, place + 2) ** 2


def test_the_interval_lies_between_steepest_and_lowest() -> None:
    found = find_range(RATES, [valley(rate) for rate in RATES])
    # Smoothing is late by about ten steps, a factor of 2.2 in the rate.
    assert 1e-4 <= found.steepest <= 3e-4
    assert 1e-2 <= found.lowest <= 4e-2
    assert (found.low, found.high) == tuple(sorted((found.steepest, found.lowest / 10)))
    assert found.diverged == RATES[-1]  # the loss has risen far above the first one


def test_a_loss_that_is_not_finite_ends_the_range() -> None:
    losses = [valley(rate) if rate < 5e-2 else math.nan for rate in RATES]
    found = find_range(RATES, losses)
    assert found.diverged is not None and 4e-2 < found.diverged < 5e-2
    assert len(found.losses) == len(found.rates) < STEPS


def test_smoothing_has_no_bias_of_its_start() -> None:
    """Against the definition: weights 0.9^age, normalized."""
    losses = [5.0, 1.0, 4.0, 2.0]
    for count, value in enumerate(smooth(losses), start=1):
        weights = [0.9 ** (count - 1 - n) for n in range(count)]
        mean = sum(w * x for w, x in zip(weights, losses, strict=False)) / sum(weights)
        assert value == pytest.approx(mean)


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([1.0] * 5, "5 finite losses, expected 10 or more"),
        ([1.0 + 0.1 * n for n in range(20)], "the loss never falls"),
        ([math.inf] * 20, "0 finite losses"),
    ],
)
def test_losses_that_say_nothing_are_one_message(losses: list[float], said: str) -> None:
    with pytest.raises(DataError, match=said):
        find_range(RATES[: len(losses)], losses)


def test_equal_results_give_equal_figures(tmp_path) -> None:
    found = find_range(RATES, [valley(rate) for rate in RATES])
    files = [tmp_path / "one.png", tmp_path / "two.png"]
    for file in files:
        draw_range(found, file)
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].read_bytes()[:4] == b"\x89PNG"
