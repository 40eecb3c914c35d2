"""The verdict on runs: do they train identically, over the steps that all of them logged?

The first run is the reference; each other run is judged against it, step by step. The data comes
first: if both logged a batch's hash or its supervised tokens, these must be equal, or no number is
compared. Then losses, gradient norm and learning rate must each lie within a band around the
reference, relative to the reference's value.

The bands:

- The learning rate is computed on the host from the config: equal to 1e-6 in every dtype.
- float32: 1e-4 for training and held-out loss, 1e-3 for the gradient norm, which is made of the
  differences that the loss averages out. The bands do not grow with the steps, although the effect
  of rounding does: it changes the weights, and these the next gradients. The bands are meant for
  100 steps. Later steps have the same bands, and the verdict tells if only later steps leave them
  (`steps` judges the first ones alone).
- Less precise dtypes: a measured noise floor (noise_floor.py), never below float32's bands. Without
  one there is no verdict.
- `loss_tolerance`, if given, replaces either for the losses.
- Numbers that were printed with few digits widen their band by the possible rounding error. If that
  is more than MOST_HIDDEN of the number itself, it can show a difference but no agreement, and is
  not compared: a learning rate printed as 0.0001 may be any from 0.00005 to 0.00015.

A NaN or an infinity never agrees, not even with itself. A number that only one of both runs logged
is not compared, and the notes count these. Agreement at few steps of long runs does not count
(coverage.py).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

from torchprime.compare.align import (
    Aligned,
    DataCheck,
    align,
    check_data,
    check_means,
    common_steps,
    differences,
    relative,
    resumed_before,
)
from torchprime.compare.coverage import cover
from torchprime.compare.logs.run import Run
from torchprime.compare.noise_floor import LR_TOLERANCE, NOISY, Band, NoiseFloor
from torchprime.compare.verdict import (
    AGREE,
    DIFFER,
    DIFFERENT_DATA,
    NOT_JUDGED,
    QUANTITIES,
    TOO_FEW,
    VERDICTS,
    Comparison,
    Judged,
    Pair,
    Point,
)
from torchprime.errors import ConfigError, DataError

LOSSES = ("loss", "eval_loss")
FLOAT32 = {"loss": 1e-4, "eval_loss": 1e-4, "grad_norm": 1e-3, "lr": LR_TOLERANCE}
PROMISED_STEPS = 100
# If rounding in the logs hides a larger part of a number, it is not compared.
MOST_HIDDEN = {"loss": 0.05, "eval_loss": 0.05, "grad_norm": 0.05, "lr": 0.01}


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
        DataError: if the runs have no step or no loss in common, nothing tells whether losses of
            one are means, or the floor is not theirs.
    """
    _check_arguments(runs, loss_tolerance, steps)
    alike = check_means(runs)
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
            _judge(reference, run, c, judged, bands, first=steps is not None)
            for run, c in zip(others, checks, strict=True)
        ]
    found = {pair.verdict for pair in pairs}
    return Comparison(
        verdict=next(verdict for verdict in VERDICTS if verdict in found),
        reference=reference,
        pairs=tuple(pairs),
        common=len(common),
        steps=tuple(judged),
        bands=bands,
        notes=(*alike, *_notes_on_dtypes(runs, bands)),
    )


def _check_arguments(runs: Sequence[Run], loss_tolerance: float | None, steps: int | None) -> None:
    if len(runs) < 2:
        raise ConfigError(f"RUN: got {len(runs)}, expected two or more; the first is the reference")
    if steps is not None and steps < 1:
        raise ConfigError(f"--steps: got {steps}, expected 1 or more")
    if loss_tolerance is not None and not 0 <= loss_tolerance < math.inf:
        raise ConfigError(f"--loss-tolerance: got {loss_tolerance}, expected a number, 0 or more")


def imprecise(runs: Sequence[Run]) -> list[str]:
    """Return the dtypes of the runs that are less precise than float32."""
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
                "leave it out for float32"
            )
        measured = ", ".join(run.label for run in floor.runs)
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
    *,
    first: bool,
) -> Pair:
    """Return the verdict on one run.

    Args:
        first: the steps are the first ones that were asked for, not all.
    """
    quantities, coarse = {}, {}
    for name in QUANTITIES:
        points, coarse[name] = _points(reference, run, name, steps, bands[name])
        if points:
            quantities[name] = Judged(points)
    if "loss" not in quantities:
        raise _no_loss(reference, run, len(steps), coarse["loss"])
    losses = quantities["loss"].points
    windows = [range(p.step - p.mean_over + 1, p.step + 1) for p in losses]
    within = range(min(w.start for w in windows), steps[-1] + 1) if first else None
    coverage = cover([reference, run], windows, within)
    if any(judged.first_beyond for judged in quantities.values()):
        verdict = DIFFER
    elif not quantities["loss"].has_band:
        verdict = NOT_JUDGED
    else:
        verdict = AGREE if coverage.enough else TOO_FEW
    notes = tuple(_notes(reference, run, steps, quantities, coarse))
    return Pair(run, verdict, check, quantities, differences(reference, run), notes, coverage)


def _no_loss(reference: Run, run: Run, steps: int, coarse: int) -> DataError:
    why = (
        "One logs means over several steps of which the other lacks some, or logs no loss there; "
        "log every step in both (logging_steps=1)."
    )
    if coarse:
        why = (
            f"At {coarse:,} of them rounding hides more than {MOST_HIDDEN['loss']:.0%} of it; log "
            "more digits."
        )
    return DataError(
        f"runs {reference.label} and {run.label}: no loss that both have on their {steps:,} common "
        f"steps. {why}"
    )


def _points(
    reference: Run, run: Run, name: str, steps: Sequence[int], band: Band | None
) -> tuple[tuple[Point, ...], int]:
    """Return the points of a quantity, and the number of steps at which rounding hides too much.

    Such a number can show a difference that is larger than what it hides, but never an agreement.
    """
    points, coarse = [], 0
    for each in align(reference, run, name, steps):
        hidden = _hidden(each)
        width = None if band is None else band.at(each.step) + hidden
        point = Point(each.step, each.reference, each.value, width, each.mean_over)
        if hidden > MOST_HIDDEN[name] and not point.beyond:
            coarse += 1
        else:
            points.append(point)
    return tuple(points), coarse


def _hidden(each: Aligned) -> float:
    """Return the part of the difference that rounding in the logs may cause, relative to the
    reference."""
    if not each.hidden or not math.isfinite(each.reference):
        return 0.0
    if each.reference == 0:
        # A relative error is undefined for a zero that was printed.
        return math.inf if abs(each.value) <= each.hidden else 0.0
    return each.hidden / abs(each.reference)


# Notes --------------------------------------------------------------------------------------------


def _notes(
    reference: Run,
    run: Run,
    steps: Sequence[int],
    quantities: Mapping[str, Judged],
    coarse: Mapping[str, int],
) -> Iterator[str]:
    for name in ("loss", "grad_norm", "lr"):
        count = len(quantities[name].points) if name in quantities else 0
        if count + coarse[name] < len(steps):
            yield f"{name}: both have it at {count + coarse[name]:,} of {len(steps):,} common steps"
    for name, count in coarse.items():
        if count:
            yield (
                f"{name}: not compared at {count:,} steps, where rounding in a log hides more than "
                f"{MOST_HIDDEN[name]:.0%} of it"
            )
    yield from _notes_on_resumes(reference, run, quantities["loss"])
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


def _notes_on_resumes(reference: Run, run: Run, losses: Judged) -> Iterator[str]:
    for point in losses.points:
        if not point.beyond or point.mean_over == 1 or point.band is None:
            continue
        found = resumed_before(reference, run, point.step, point.band)
        if found is not None:
            means, start = found
            yield (
                f"loss: at step {point.step:,} it agrees as the mean of steps {start + 1:,} to "
                f"{point.step:,}, which a run that was resumed at step {start:,} logs; if it was, "
                f"say --resumed-at {means.label}={start}"
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
