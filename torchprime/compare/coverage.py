"""The part of two runs that a comparison covers: "agree over 1 of 60 steps" is no agreement.

The steps of both runs, from the first of either to the last, are split into STRETCHES equal parts
(one step each if there are fewer). Losses must have been compared in at least LEAST of them. A log
of every 50th step covers a long run; a few steps at its beginning or middle do not.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torchprime.compare.entries import CoverageEntry
from torchprime.compare.logs.run import Run

STRETCHES = 10
LEAST = 0.3


@dataclass(frozen=True)
class Coverage:
    """The part of two runs whose losses were compared.

    Attributes:
        steps: that the compared losses cover.
        of: steps that the log of the longer run covers.
        stretches: of the runs, that have a compared loss.
        of_stretches: in which the runs were cut.
    """

    steps: int
    of: int
    stretches: int
    of_stretches: int

    @property
    def needed(self) -> int:
        """The number of stretches that an agreement needs."""
        return math.ceil(LEAST * self.of_stretches)

    @property
    def enough(self) -> bool:
        return self.stretches >= self.needed

    @property
    def told(self) -> str:
        """`60 steps`, or `1 of 60 steps`."""
        part = "" if self.steps == self.of else f"{self.steps:,} of "
        return f"{part}{self.of:,} step" + "s" * (self.of != 1)

    def to_dict(self) -> CoverageEntry:
        """Return the entry in parity.json."""
        return {
            "steps": self.steps,
            "of": self.of,
            "stretches": self.stretches,
            "of_stretches": self.of_stretches,
            "needed": self.needed,
        }


def cover(runs: Sequence[Run], windows: Iterable[range], within: range | None = None) -> Coverage:
    """Measure the part of the runs that these windows of compared losses cover.

    Args:
        within: look at these steps alone.
    """
    logged = [run.covered for run in runs]
    if within is not None:
        logged = [steps & set(within) for steps in logged]
    compared = {step for window in windows for step in window if within is None or step in within}
    every = set().union(*logged)
    first, length = min(every), max(every) - min(every) + 1
    parts = min(STRETCHES, length)
    touched = {(step - first) * parts // length for step in compared}
    return Coverage(len(compared), max(map(len, logged)), len(touched), parts)
