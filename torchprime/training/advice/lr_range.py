"""The learning rates at which a run's loss fell, from a run whose rate rises exponentially.

The learning-rate range test is by Smith (2015, arXiv:1506.01186); the two rates that it suggests
are fastai's (Howard & Gugger 2020, arXiv:2002.04688): a tenth of the rate with the lowest loss, and
the rate with the steepest fall of the loss over the logarithm of the rate.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torchprime.errors import DataError

MEMORY = 0.9  # of the exponential mean that smooths the losses
FEWEST = 10  # steps from which something can be said
TOO_MUCH = 1.05  # times the first loss: the rate is too high


@dataclass(frozen=True)
class LrRange:
    """The result of a range test.

    Attributes:
        rates, losses: of each step, as logged.
        smoothed: the losses' exponential mean, without the bias of its start.
        lowest: the learning rate with the lowest smoothed loss.
        steepest: the one with the steepest fall before that.
        low, high: the interval to try first: the steepest rate and a tenth of the lowest one, in
            order.
        diverged: the last learning rate, if a loss was not finite or rose far above the first one.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    lowest: float
    steepest: float
    low: float
    high: float
    diverged: float | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def find_range(rates: Sequence[float], losses: Sequence[float]) -> LrRange:
    """Find the interval of learning rates to try first.

    Args:
        rates: rising, one for each step; `losses` the same.

    Raises:
        DataError: fewer than 10 finite losses, or a loss that never falls.
    """
    finite = next((n for n, loss in enumerate(losses) if not math.isfinite(loss)), len(losses))
    rates_used, used = rates[:finite], losses[:finite]
    if finite < FEWEST:
        raise DataError(
            f"lr-range: {finite} finite losses, expected {FEWEST} or more. Give more --steps, or a "
            "smaller --to."
        )
    smoothed = smooth(used)
    best = min(range(finite), key=smoothed.__getitem__)
    falls = [(smoothed[n + 1] - smoothed[n]) / math.log(rates_used[n + 1] / rates_used[n])
             for n in range(best)]  # fmt: skip
    if not falls or min(falls) >= 0:
        raise DataError(
            f"lr-range: the loss never falls between the rates {rates_used[0]:.1e} and "
            f"{rates_used[-1]:.1e}. Give a smaller --from; if it is small already, look at the "
            "rows with `torchprime inspect`."
        )
    steepest = rates_used[min(range(best), key=falls.__getitem__)]
    lowest = rates_used[best]
    low, high = sorted((steepest, lowest / 10))
    too_high = finite < len(losses) or smoothed[-1] > TOO_MUCH * smoothed[0]
    return LrRange(
        rates=tuple(rates_used),
        losses=tuple(used),
        smoothed=tuple(smoothed),
        lowest=lowest,
        steepest=steepest,
        low=low,
        high=high,
        diverged=rates_used[-1] if too_high else None,
    )


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the exponential mean at each step, divided by the sum of its weights."""
    mean, found = 0.0, []
    for number, loss in enumerate(losses, start=1):
        mean = MEMORY * mean + (1 - MEMORY) * loss
        found.append(mean / (1 - MEMORY**number))
    return found
