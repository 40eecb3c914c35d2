"""Learning-rate schedules as pure functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

# Of inverse_sqrt without a warm-up, as in transformers.
TIMESCALE = 10_000


@dataclass(frozen=True)
class Schedule:
    """The learning rate of each update: a linear warm-up from 0 to the peak, then a shape.

    Like in transformers' schedules, update 0 of a warm-up has learning rate 0. The shapes:

    - constant
    - linear, cosine: from the peak to the floor, peak x min_lr_ratio, at `total_steps`
    - cosine_with_restarts: that cosine several times, each from the peak
    - inverse_sqrt: peak x sqrt(warm-up / step), not below the floor
    - exponential: rises from the floor by equal factors to the peak at the last update; it shows
      which learning rates train (`torchprime lr-range`)
    - wsd: constant, then from the peak to the floor in the last `decay_steps` updates

    Attributes:
        decay_shape: of wsd: linear, cosine or sqrt (1 - sqrt of the progress).
        cycles: of cosine_with_restarts.
    """

    name: str
    peak: float
    total_steps: int
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    decay_steps: int = 0
    decay_shape: str = "linear"
    cycles: int = 1

    def rate(self, step: int) -> float:
        """Return the learning rate of update number `step` (0-based)."""
        if step < self.warmup_steps:
            return self.peak * step / self.warmup_steps
        if self.name == "constant":
            return self.peak
        if self.name == "inverse_sqrt":
            return self.peak * max(self.min_lr_ratio, self._inverse_sqrt(step))
        if self.name == "exponential":
            first, last = self.warmup_steps, self.total_steps - 1
            return self.peak * self.min_lr_ratio ** (1 - (step - first) / max(1, last - first))
        return self.peak * (self.min_lr_ratio + (1 - self.min_lr_ratio) * self._falling(step))

    def _inverse_sqrt(self, step: int) -> float:
        scale = self.warmup_steps or TIMESCALE
        return math.sqrt(scale / (step - self.warmup_steps + scale))

    def _falling(self, step: int) -> float:
        """Return the part of the way from floor to peak that is left, of shapes that end at
        `total_steps`."""
        first, shape = self.warmup_steps, self.name
        if self.name == "wsd":
            first, shape = self.total_steps - self.decay_steps, self.decay_shape
        progress = min(1.0, max(0.0, (step - first) / max(1, self.total_steps - first)))
        if shape == "cosine_with_restarts" and progress < 1:
            progress = self.cycles * progress % 1.0
        if shape == "linear":
            return 1 - progress
        if shape == "sqrt":
            return 1 - math.sqrt(progress)
        return 0.5 * (1 + math.cos(math.pi * progress))


def schedule_note(rate: Callable[[int], float], *, peak: float, total_steps: int) -> str | None:
    """Return a note on unusual learning rates of a run; None if they reach the peak.

    Args:
        rate: of the 0-based step.
    """
    if any(rate(step) >= 0.999 * peak for step in range(total_steps)):
        return None
    highest = max(map(rate, range(total_steps)))
    fix = "Lower task.lr_scheduler.warmup_steps (or warmup_ratio), or train longer."
    if highest == 0:
        return (
            "the learning rate is 0 in every update, so nothing will be trained: a warm-up begins "
            f"at 0, and the run ends within it, after {total_steps:,}. {fix}"
        )
    return (
        f"the warm-up is longer than the run: after {total_steps:,} updates the learning rate has "
        f"reached {highest:.2e} of {peak:.2e}. {fix}"
    )
