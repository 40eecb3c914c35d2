"""The result of a comparison: every number beside the reference's, and the verdict on them.

`Comparison.to_dict` is parity.json; JSON has no NaN and no infinity, so there they are the strings
"nan", "inf" and "-inf".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from torchprime.compare.align import DataCheck, relative
from torchprime.compare.coverage import Coverage
from torchprime.compare.entries import (
    PairEntry,
    ParityFile,
    PointEntry,
    QuantityEntry,
    RunEntry,
)
from torchprime.compare.logs.run import Run
from torchprime.compare.noise_floor import Band

QUANTITIES = ("loss", "eval_loss", "grad_norm", "lr")

AGREE, DIFFER = "agree", "differ"
DIFFERENT_DATA, NOT_JUDGED = "different data", "not judged"
TOO_FEW = "too few steps"
# The verdict on all runs is the first of these that any run has.
VERDICTS = (DIFFERENT_DATA, DIFFER, NOT_JUDGED, TOO_FEW, AGREE)


@dataclass(frozen=True)
class Point:
    """One quantity of both runs at one step.

    Attributes:
        band: relative; None: there is none.
        mean_over: both are means over so many steps, of which this is the last.
    """

    step: int
    reference: float
    value: float
    band: float | None
    mean_over: int = 1

    @property
    def relative(self) -> float:
        return relative(self.reference, self.value)

    @property
    def beyond(self) -> bool:
        if self.band is None:
            return False
        if not (math.isfinite(self.reference) and math.isfinite(self.value)):
            return True
        return self.relative > self.band

    def to_dict(self) -> PointEntry:
        """Return the entry in parity.json."""
        return {
            "step": self.step,
            "reference": self.reference,
            "value": self.value,
            "relative": self.relative,
            "band": self.band,
        }


@dataclass(frozen=True)
class Judged:
    """One quantity at all steps where both runs have it; at least one step."""

    points: tuple[Point, ...]

    @property
    def worst(self) -> Point:
        """The largest deviation, the first of equal ones."""
        return max(self.points, key=lambda point: point.relative)

    @property
    def first_beyond(self) -> Point | None:
        return next((point for point in self.points if point.beyond), None)

    @property
    def has_band(self) -> bool:
        return self.points[0].band is not None

    def to_dict(self) -> QuantityEntry:
        """Return the entry in parity.json."""
        first = self.first_beyond
        return {
            "steps": len(self.points),
            "judged": self.has_band,
            "beyond": sum(point.beyond for point in self.points),
            "worst": self.worst.to_dict(),
            "first_beyond": first and first.to_dict(),
        }


@dataclass(frozen=True)
class Pair:
    """A run and its comparison with the reference."""

    run: Run
    verdict: str
    data: DataCheck
    quantities: Mapping[str, Judged]  # empty if any run's data differ
    differences: Mapping[str, tuple[Any, Any]]  # other differences between the runs, by name
    notes: tuple[str, ...] = ()
    coverage: Coverage | None = None  # of the runs by the losses compared; None if none were

    @property
    def first_beyond(self) -> tuple[str, Point] | None:
        """The quantity that first leaves its band, and the step; the loss if several do so at one
        step."""
        found = [(n, p) for n, q in self.quantities.items() if (p := q.first_beyond) is not None]
        return min(found, key=lambda each: each[1].step, default=None)

    def to_dict(self) -> PairEntry:
        """Return the entry in parity.json."""
        first = self.first_beyond
        return {
            "run": self.run.label,
            "verdict": self.verdict,
            "data": self.data.to_dict(),
            "coverage": self.coverage and self.coverage.to_dict(),
            "first_beyond": first and {**first[1].to_dict(), "quantity": first[0]},
            "quantities": {name: each.to_dict() for name, each in self.quantities.items()},
            "differences": {name: list(both) for name, both in self.differences.items()},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Comparison:
    """The verdict and the numbers that it depends on."""

    verdict: str
    reference: Run
    pairs: tuple[Pair, ...]
    common: int  # steps that all runs logged
    steps: tuple[int, ...]  # of these, the ones judged
    bands: Mapping[str, Band | None]
    notes: tuple[str, ...] = ()

    @property
    def runs(self) -> tuple[Run, ...]:
        return (self.reference, *(pair.run for pair in self.pairs))

    @property
    def told_steps(self) -> str:
        """The steps over which the least covered run was compared: `6 of 60 steps`."""
        found = [pair.coverage for pair in self.pairs if pair.coverage is not None]
        return min(found, key=lambda each: each.steps / each.of).told

    def to_dict(self) -> ParityFile:
        """Return the content of parity.json."""
        content: ParityFile = {
            "verdict": self.verdict,
            "reference": self.reference.label,
            "steps": {
                "common": self.common,
                "judged": len(self.steps),
                "first": self.steps[0],
                "last": self.steps[-1],
            },
            "tolerances": {name: band and band.to_dict() for name, band in self.bands.items()},
            "runs": [_run_entry(run) for run in self.runs],
            "pairs": [pair.to_dict() for pair in self.pairs],
            "notes": list(self.notes),
        }
        return _plain(content)


def _run_entry(run: Run) -> RunEntry:
    return {
        "label": run.label,
        "path": run.path,
        "source": run.source,
        "steps": len(run.steps),
        "first_step": min(run.steps),
        "last_step": max(run.steps),
        "dtype": run.dtype,
        "backend": run.facts.get("backend"),
        "device": run.facts.get("device"),
        "mesh": run.facts.get("mesh"),
        "versions": run.facts.get("versions"),
        "supervised_tokens_per_s": usual_speed(run),
        "notes": list(run.notes),
    }


def usual_speed(run: Run) -> float | None:
    """Return the median of the logged supervised tokens per second."""
    logged = (step.supervised_tokens_per_s for step in run.steps.values())
    rates = [rate for rate in logged if rate is not None and math.isfinite(rate)]
    return median(rates) if rates else None


def _plain(value: Any) -> Any:
    """Return the value in JSON types."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and math.isfinite(value) or value is None:
        return value
    return value if isinstance(value, bool | int) else str(value)
