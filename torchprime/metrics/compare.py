"""Are these runs the same training? A verdict over the steps that all of them logged.

The first run is the reference; each other run is judged against it, step by step. First the data:
where both logged a batch's hash or its supervised tokens, these must be equal, or nothing else is
looked at. Then losses, gradient norm and learning rate: each must lie within a band around the
reference, relative to the reference's value.

Where the bands come from:

- The learning rate is computed on the host from the config: equal to 1e-6, whatever the dtype.
- float32: 1e-4 for training and held-out loss, 1e-3 for the gradient norm, which is made of the
  differences that the loss averages away. The bands do not grow with the steps, though rounding
  does: it changes the weights, and these the next gradients. The promise is for 100 steps; later
  ones are held to the same bands, and a verdict that only they break says so (`steps` judges the
  first ones alone).
- Less precise dtypes: a measured noise floor (noise_floor.py), never below float32's bands. Without
  one there is no verdict.
- `loss_tolerance`, if given, instead of either for the losses.
- Numbers that were printed with few digits widen their band by what rounding may hide.

A NaN or an infinity agrees with nothing, not even with itself. A number that one of both did not
log is not compared, and the notes count these. `Comparison.to_dict` is parity.json; JSON has no NaN
and no infinity, so there they are the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from torchprime.errors import ConfigError, DataError
from torchprime.metrics.align import (
    Aligned,
    DataCheck,
    align,
    check_data,
    common_steps,
    differences,
    relative,
)
from torchprime.metrics.noise_floor import LR_TOLERANCE, NOISY, Band, NoiseFloor
from torchprime.metrics.read_logs import Run

QUANTITIES = ("loss", "eval_loss", "grad_norm", "lr")
LOSSES = ("loss", "eval_loss")
FLOAT32 = {"loss": 1e-4, "eval_loss": 1e-4, "grad_norm": 1e-3, "lr": LR_TOLERANCE}
PROMISED_STEPS = 100

AGREE, DIFFER = "agree", "differ"
DIFFERENT_DATA, NOT_JUDGED = "different data", "not judged"
# The verdict on all runs is the first of these that any of them has.
VERDICTS = (DIFFERENT_DATA, DIFFER, NOT_JUDGED, AGREE)


@dataclass(frozen=True)
class Point:
    """One quantity of both runs at one step."""

    step: int
    reference: float
    value: float
    band: float | None  # relative; None: there is none

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

    def to_dict(self) -> dict[str, Any]:
        values = {"step": self.step, "reference": self.reference, "value": self.value}
        return values | {"relative": self.relative, "band": self.band}


@dataclass(frozen=True)
class Judged:
    """One quantity at all steps where both runs have it; there is at least one."""

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

    def to_dict(self) -> dict[str, Any]:
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
    """A run against the reference."""

    run: Run
    verdict: str
    data: DataCheck
    quantities: Mapping[str, Judged]  # empty if any run's data differ
    differences: Mapping[str, tuple[Any, Any]]  # what else is not the same, by name
    notes: tuple[str, ...] = ()

    @property
    def first_beyond(self) -> tuple[str, Point] | None:
        """The quantity that first leaves its band, and where; of several at a step, the loss."""
        found = [(n, p) for n, q in self.quantities.items() if (p := q.first_beyond) is not None]
        return min(found, key=lambda each: each[1].step, default=None)

    def to_dict(self) -> dict[str, Any]:
        first = self.first_beyond
        return {
            "run": self.run.label,
            "verdict": self.verdict,
            "data": self.data.to_dict(),
            "first_beyond": first and {"quantity": first[0], **first[1].to_dict()},
            "quantities": {name: each.to_dict() for name, each in self.quantities.items()},
            "differences": {name: list(both) for name, both in self.differences.items()},
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class Comparison:
    """The verdict and all it stands on."""

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

    def to_dict(self) -> dict[str, Any]:
        """parity.json."""
        return _plain(
            {
                "verdict": self.verdict,
                "reference": self.reference.label,
                "steps": {
                    "common": self.common,
                    "judged": len(self.steps),
                    "first": self.steps[0],
                    "last": self.steps[-1],
                },
                "tolerances": {name: band and band.to_dict() for name, band in self.bands.items()},
                "runs": [_run_facts(run) for run in self.runs],
                "pairs": [pair.to_dict() for pair in self.pairs],
                "notes": list(self.notes),
            }
        )


def _run_facts(run: Run) -> dict[str, Any]:
    return {
        "label": run.label,
        "path": run.path,
        "source": run.source,
        "steps": len(run.steps),
        "first_step": min(run.steps),
        "last_step": max(run.steps),
        "dtype": run.dtype,
        **{name: run.facts.get(name) for name in ("backend", "device", "mesh", "versions")},
        "supervised_tokens_per_s": usual_speed(run),
        "notes": list(run.notes),
    }


def usual_speed(run: Run) -> float | None:
    """The median of the logged supervised tokens per second."""
    logged = (step.supervised_tokens_per_s for step in run.steps.values())
    rates = [rate for rate in logged if rate is not None and math.isfinite(rate)]
    return median(rates) if rates else None


def _plain(value: Any) -> Any:
    """What JSON can hold."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and math.isfinite(value) or value is None:
        return value
    return value if isinstance(value, bool | int) else str(value)


# Judging ------------------------------------------------------------------------------------------


def compare(
    runs: Sequence[Run],
    *,
    loss_tolerance: float | None = None,
    floor: NoiseFloor | None = None,
    steps: int | None = None,
) -> Comparison:
    """Judge every run against the first.

    Args:
        runs: two or more, with different labels.
        loss_tolerance: replaces the band of both losses.
        floor: where the bands of dtypes below float32 come from.
        steps: look at only so many of the common steps, from the first.

    Raises:
        ConfigError: for fewer than two runs, or a number out of range.
        DataError: if the runs have no step or no loss in common, or the floor is not theirs.
    """
    _check_arguments(runs, loss_tolerance, steps)
    reference, *others = runs
    common = common_steps(runs)
    judged = common[:steps]
    bands = _bands(runs, loss_tolerance, floor)
    checks = [check_data(reference, run, judged) for run in others]
    if any(check.same is False for check in checks):
        pairs = [_unlike(reference, run, c) for run, c in zip(others, checks, strict=True)]
    else:
        if floor is not None:
            _check_covered(floor, judged)
        pairs = [
            _judge(reference, run, c, judged, bands) for run, c in zip(others, checks, strict=True)
        ]
    found = {pair.verdict for pair in pairs}
    return Comparison(
        verdict=next(verdict for verdict in VERDICTS if verdict in found),
        reference=reference,
        pairs=tuple(pairs),
        common=len(common),
        steps=tuple(judged),
        bands=bands,
        notes=tuple(_notes_on_dtypes(runs, bands)),
    )


def _check_arguments(runs: Sequence[Run], loss_tolerance: float | None, steps: int | None) -> None:
    if len(runs) < 2:
        raise ConfigError(f"RUN: got {len(runs)}, expected two or more; the first is the reference")
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps: got {steps}, expected 1 or more")
    if loss_tolerance is not None and not 0 <= loss_tolerance < math.inf:
        raise ConfigError(f"--loss-tolerance: got {loss_tolerance}, expected a number, 0 or more")


def imprecise(runs: Sequence[Run]) -> list[str]:
    """The dtypes of the runs that float32's bands are too narrow for."""
    return sorted({run.dtype for run in runs if run.dtype} - {"float32", "float64"})


def _bands(
    runs: Sequence[Run], loss_tolerance: float | None, floor: NoiseFloor | None
) -> dict[str, Band | None]:
    bands: dict[str, Band | None] = {
        name: Band("fixed for float32", width) for name, width in FLOAT32.items()
    }
    bands["lr"] = Band("fixed for every dtype", FLOAT32["lr"])
    dtypes = imprecise(runs)
    if floor is not None:
        unknown = any(run.dtype is None for run in runs)
        if dtypes != [floor.dtype] and (dtypes or not (unknown or floor.dtype == "float32")):
            raise DataError(
                f"--noise-floor: measured in {floor.dtype}, and these runs are "
                f"{' and '.join(dtypes) or 'float32'}; measure it on runs of the same dtype, or "
                "leave it away for float32"
            )
        measured = ", ".join(str(run.get("label")) for run in floor.runs)
        origin = (
            f"noise floor in {floor.dtype} of {measured}: "
            f"{floor.factor:g} times the largest spread of {floor.window} records"
        )
        bands |= {name: floor.band(name, FLOAT32[name], origin) for name in NOISY}
    elif dtypes:
        bands |= dict.fromkeys(NOISY)
    if loss_tolerance is not None:
        bands |= {name: Band("given as --loss-tolerance", loss_tolerance) for name in LOSSES}
    return bands


def _check_covered(floor: NoiseFloor, steps: Sequence[int]) -> None:
    if steps[-1] <= floor.last_step:
        return
    covered = sum(step <= floor.last_step for step in steps)
    advice = f"judge those alone with --steps {covered}, or " if covered else ""
    raise DataError(
        f"--noise-floor: measured up to step {floor.last_step:,}, and these runs go to "
        f"{steps[-1]:,}; {covered:,} of their {len(steps):,} common steps are covered. Noise grows "
        f"with the steps: {advice}measure longer runs."
    )


def _unlike(reference: Run, run: Run, check: DataCheck) -> Pair:
    verdict = DIFFERENT_DATA if check.same is False else NOT_JUDGED
    return Pair(run, verdict, check, {}, differences(reference, run))


def _judge(
    reference: Run,
    run: Run,
    check: DataCheck,
    steps: Sequence[int],
    bands: Mapping[str, Band | None],
) -> Pair:
    quantities = {}
    for name in QUANTITIES:
        if points := _points(reference, run, name, steps, bands[name]):
            quantities[name] = Judged(points)
    if "loss" not in quantities:
        raise DataError(
            f"runs {reference.label} and {run.label}: no loss that both have on their "
            f"{len(steps):,} common steps. One logs means over several steps of which the other "
            "lacks some, or logs no loss there; log every step in both (logging_steps=1)."
        )
    if any(judged.first_beyond for judged in quantities.values()):
        verdict = DIFFER
    else:
        verdict = AGREE if quantities["loss"].has_band else NOT_JUDGED
    notes = tuple(_notes(reference, run, steps, quantities))
    return Pair(run, verdict, check, quantities, differences(reference, run), notes)


def _points(
    reference: Run, run: Run, name: str, steps: Sequence[int], band: Band | None
) -> tuple[Point, ...]:
    points = []
    for each in align(reference, run, name, steps):
        width = None if band is None else band.at(each.step) + _hidden(each)
        points.append(Point(each.step, each.reference, each.value, width))
    return tuple(points)


def _hidden(each: Aligned) -> float:
    """What rounding in the logs may be of the difference, in units of the reference."""
    if not each.hidden or not math.isfinite(each.reference):
        return 0.0
    if each.reference == 0:
        # No multiple of zero says how near a number is to a zero that was printed.
        return math.inf if abs(each.value) <= each.hidden else 0.0
    return each.hidden / abs(each.reference)


# Notes --------------------------------------------------------------------------------------------


def _notes(
    reference: Run, run: Run, steps: Sequence[int], quantities: Mapping[str, Judged]
) -> Iterator[str]:
    for name in ("loss", "grad_norm", "lr"):
        count = len(quantities[name].points) if name in quantities else 0
        if count < len(steps):
            yield f"{name}: both have it at {count:,} of {len(steps):,} common steps"
    for name, judged in quantities.items():
        if not judged.has_band:
            yield f"{name}: not judged, there is no band for it"
    beyond = [point.step for judged in quantities.values() if (point := judged.first_beyond)]
    if len(steps) > PROMISED_STEPS and beyond and min(beyond) > steps[PROMISED_STEPS - 1]:
        yield (
            f"the first {PROMISED_STEPS} common steps are within the bands; rounding grows with "
            f"the steps, --steps {PROMISED_STEPS} judges those alone"
        )
    if "lr" in quantities and quantities["lr"].first_beyond and _lr_is_late(reference, run, steps):
        yield (
            "lr: at each step it is the reference's of the next step, so this log has it after the "
            "scheduler's step, as older transformers do"
        )


def _lr_is_late(reference: Run, run: Run, steps: Sequence[int]) -> bool:
    both = [
        (after.lr, logged)
        for step in steps
        if (after := reference.steps.get(step + 1)) and after.lr is not None
        if (logged := run.steps[step].lr) is not None
    ]
    return len(both) > 1 and all(relative(a, b) <= LR_TOLERANCE for a, b in both)


def _notes_on_dtypes(runs: Sequence[Run], bands: Mapping[str, Band | None]) -> Iterator[str]:
    unknown = [run.label for run in runs if run.dtype is None]
    dtypes = imprecise(runs)
    if unknown and not dtypes and bands["loss"]:
        yield f"the dtype of {', '.join(unknown)} is not known; the band is {bands['loss'].origin}"
    if dtypes and bands["loss"] is None:
        yield (
            f"there is no band for {' and '.join(dtypes)} before its noise is measured, on runs "
            "that differ only in what must not matter, such as mesh or accumulation"
        )
