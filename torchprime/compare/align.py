"""Alignment of runs: their common steps, data and numbers, and their other differences."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchprime.compare.entries import DataEntry, DifferenceEntry
from torchprime.compare.logs.run import Run
from torchprime.errors import DataError

# Fields of run.json that may matter; the rest is derived, or differs in every run.
_FACTS = (
    "versions", "backend", "device", "processes", "mesh", "attention", "loss", "model",
    "fingerprints",
)  # fmt: skip
_OWN_KEYS = ("config.run_name", "config.output_dir")


def relative(reference: float, value: float) -> float:
    """Return the distance of the value from the reference, relative to the reference; inf if either
    is none."""
    if not (math.isfinite(reference) and math.isfinite(value)):
        return math.inf
    if value == reference:
        return 0.0
    return abs(value - reference) / abs(reference) if reference else math.inf


def common_steps(runs: Sequence[Run]) -> list[int]:
    """Return the steps that all runs logged, in order. Raise a DataError if there is none."""
    common = sorted(set.intersection(*(set(run.steps) for run in runs)))
    if not common:
        told = ", ".join(
            f"{run.label}: {len(run.steps):,} from {min(run.steps):,} to {max(run.steps):,}"
            for run in runs
        )
        raise DataError(
            f"runs: no step was logged by all of them ({told}); expected runs that log some of the "
            "same steps. Repeat one with the other's logging_steps."
        )
    return common


def check_means(runs: Sequence[Run]) -> list[str]:
    """Refuse logs whose losses may or may not be means, unless all logs are alike.

    Returns:
        A note on logs that are alike, for their reader.

    Raises:
        DataError: naming the run and the option that tells it.
    """
    asked = [run for run in runs if run.undecided > 1]
    if not asked:
        return []
    apart = asked[0].undecided
    if len(asked) == len(runs) and all(run.undecided == apart for run in runs):
        return [
            f"their records are {apart} steps apart, and no log says whether a loss is of "
            "one step or a mean; all are assumed to mean the same"
        ]
    raise DataError(
        f"run {asked[0].label}: its records are {apart} steps apart, and nothing in it tells "
        "whether a loss is its step's own or the mean since the record before. Say it: --mean-over "
        f"{asked[0].label}=1 or --mean-over {asked[0].label}={apart}"
    )


@dataclass(frozen=True)
class DataDifference:
    """A step at which two runs had different data.

    Attributes:
        what: the logged field that differs, batch_hash or supervised_tokens.
        moved_from: the step at which the reference has the run's batch; None if it has it at none.
    """

    step: int
    what: str
    reference: str | int
    value: str | int
    moved_from: int | None = None

    def to_dict(self) -> DifferenceEntry:
        """Return the entry in parity.json."""
        values: DifferenceEntry = {
            "step": self.step,
            "what": self.what,
            "reference": self.reference,
            "value": self.value,
        }
        if self.what == "batch_hash":
            values["reference_has_it_at_step"] = self.moved_from
        return values


@dataclass(frozen=True)
class DataCheck:
    """The result of comparing a run's batches with the reference's."""

    hashes: int = 0  # steps at which both logged one
    tokens: int = 0  # steps at which both logged the supervised tokens
    first_difference: DataDifference | None = None

    @property
    def same(self) -> bool | None:
        """True if the data is the same; None if unknown, as equal numbers of tokens do not prove
        equal tokens."""
        if self.first_difference is not None:
            return False
        return True if self.hashes else None

    def to_dict(self) -> DataEntry:
        """Return the entry in parity.json."""
        return {
            "same": self.same,
            "steps_with_hashes": self.hashes,
            "steps_with_supervised_tokens": self.tokens,
            "first_difference": self.first_difference and self.first_difference.to_dict(),
        }


def check_data(reference: Run, run: Run, steps: Sequence[int]) -> DataCheck:
    """Compare batch hashes and supervised tokens at `steps`."""
    counts = {"batch_hash": 0, "supervised_tokens": 0}
    first: DataDifference | None = None
    for step in steps:
        ours, theirs = reference.steps[step], run.steps[step]
        for name in counts:
            a, b = getattr(ours, name), getattr(theirs, name)
            if a is None or b is None:
                continue
            counts[name] += 1
            if a != b and first is None:
                moved = _place(reference, b) if name == "batch_hash" else None
                first = DataDifference(step, name, a, b, moved)
    return DataCheck(counts["batch_hash"], counts["supervised_tokens"], first)


def _place(run: Run, batch_hash: str) -> int | None:
    steps = (step for step, logged in run.steps.items() if logged.batch_hash == batch_hash)
    return next(steps, None)


@dataclass(frozen=True)
class Aligned:
    """One quantity of two runs at one step.

    Attributes:
        hidden: how much of their difference rounding in the logs may be.
        mean_over: both are means over so many steps, of which this is the last.
    """

    step: int
    reference: float
    value: float
    hidden: float
    mean_over: int = 1


def align(reference: Run, run: Run, name: str, steps: Sequence[int]) -> list[Aligned]:
    """Return the quantity at each step where both runs have it; `eval_loss` uses its own steps up
    to the last.

    A run whose losses are means over several steps is set beside the other's mean over the same
    ones. A loss that is the mean of an unknown number of steps is left out.
    """
    if name == "eval_loss":
        both = sorted(set(reference.heldout) & set(run.heldout))
        return [
            Aligned(
                step,
                reference.heldout[step],
                run.heldout[step],
                reference.heldout_rounding.get(step, 0.0) + run.heldout_rounding.get(step, 0.0),
            )
            for step in both
            if step <= steps[-1]
        ]
    found = []
    for step in steps:
        window = common_window(reference, run, step) if name == "loss" else range(step, step + 1)
        if window is None:
            continue
        ours, theirs = (_number(each, step, name, window) for each in (reference, run))
        if ours is not None and theirs is not None:
            found.append(Aligned(step, ours[0], theirs[0], ours[1] + theirs[1], len(window)))
    return found


def common_window(reference: Run, run: Run, step: int) -> range | None:
    """Return the steps that both runs' losses at this step cover: the longer of the two windows.

    None if one is of unknown length.
    """
    both = [reference.steps[step], run.steps[step]]
    if any(each.mean_over is None for each in both):
        return None
    return max((each.window for each in both), key=len)


def _number(run: Run, step: int, name: str, window: range) -> tuple[float, float] | None:
    """Return the run's number and its rounding error, as a mean over the window."""
    logged = run.steps[step]
    value = getattr(logged, name)
    if value is None:
        return None
    if name != "loss" or logged.mean_over == len(window):
        return value, logged.rounding.get(name, 0.0)
    return mean_loss(run, window)


def mean_loss(run: Run, window: range) -> tuple[float, float] | None:
    """Return the run's mean loss over these steps and its rounding error, from records that cover
    them exactly; None if there are no such records."""
    step, total, hidden = window[-1], 0.0, 0.0
    while step >= window[0]:
        part = run.steps.get(step)
        if part is None or part.loss is None or part.mean_over is None:
            return None
        total += part.loss * part.mean_over
        hidden = max(hidden, part.rounding.get("loss", 0.0))
        step -= part.mean_over
    return (total / len(window), hidden) if step == window[0] - 1 else None


def resumed_before(reference: Run, run: Run, step: int, width: float) -> tuple[Run, int] | None:
    """Return the run of means and the step at which it must have been resumed for these losses to
    agree; None if no resume explains them.

    A resumed Trainer's first record is the mean since the resume, which the record does not say.

    Args:
        width: the band, relative, with what rounding hides.
    """
    means, singles = sorted((reference, run), key=lambda each: -(each.steps[step].mean_over or 0))
    logged = means.steps[step]
    if logged.loss is None or (logged.mean_over or 1) == 1:
        return None
    for start in logged.window[:-1]:
        other = mean_loss(singles, range(start + 1, step + 1))
        if other is not None and relative(other[0], logged.loss) <= width:
            return means, start
    return None


def differences(reference: Run, run: Run) -> dict[str, tuple[Any, Any]]:
    """Return the differing entries of run.json and config.yaml by dotted name; None for a missing
    one.

    A file that one of the runs lacks is not compared.
    """
    ours, theirs = {}, {}
    if reference.facts and run.facts:
        ours |= dict(_leaves({name: reference.facts.get(name) for name in _FACTS}, ""))
        theirs |= dict(_leaves({name: run.facts.get(name) for name in _FACTS}, ""))
    if reference.config and run.config:
        ours |= dict(_leaves(reference.config, "config."))
        theirs |= dict(_leaves(run.config, "config."))
    return {
        name: (ours.get(name), theirs.get(name))
        for name in {**ours, **theirs}
        if ours.get(name) != theirs.get(name) and name not in _OWN_KEYS
    }


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
