"""The content of a run's log in one form: its steps, their numbers and rounding errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class LoggedStep:
    """A logged training step; values that were not logged are None.

    Attributes:
        step: finished updates, so the first is 1.
        mean_over: the loss is the mean of so many steps, of which this is the last. None: of an
            unknown number, so that the loss cannot be compared.
        rounding: by field, half a unit of its last printed digit.
    """

    step: int
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    supervised_tokens: int | None = None
    batch_hash: str | None = None
    supervised_tokens_per_s: float | None = None
    mean_over: int | None = 1
    rounding: Mapping[str, float] = field(default_factory=dict)

    @property
    def window(self) -> range:
        """The steps that the loss covers."""
        return range(self.step - (self.mean_over or 1) + 1, self.step + 1)


@dataclass(frozen=True)
class Run:
    """A run, as far as its logs describe it.

    Attributes:
        path: as given.
        source: the kind of file that was read.
        steps: in order.
        heldout: held-out loss by step.
        facts, config: run.json and config.yaml, where they lie beside the log.
        undecided: the usual distance between records where it is more than 1 and nothing tells
            whether a loss is its step's or a mean since the record before; else 1.
    """

    label: str
    path: str
    source: str
    steps: Mapping[int, LoggedStep]
    heldout: Mapping[int, float] = field(default_factory=dict)
    heldout_rounding: Mapping[int, float] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    undecided: int = 1

    @property
    def dtype(self) -> str | None:
        """The dtype that the model computes in, or None if it is unknown."""
        model = self.facts.get("model")
        told = model.get("dtype") if isinstance(model, dict) else None
        return told or self.config.get("torch_dtype")

    @property
    def covered(self) -> set[int]:
        """All steps that the logged losses cover."""
        return {step for logged in self.steps.values() for step in logged.window}


@dataclass(frozen=True)
class HowLogged:
    """The user's facts on a log that does not contain them.

    Attributes:
        mean_over: each loss is the mean of so many steps; 1: it is its step's own.
        resumed_at: steps after which the run was resumed.
    """

    mean_over: int | None = None
    resumed_at: tuple[int, ...] = ()


@dataclass
class Log:
    """The content of one file.

    Attributes:
        means: each loss is the mean since the record before (True), its step's own (False), or
            nothing tells (None).
    """

    source: str
    steps: list[LoggedStep]
    means: bool | None = False
    heldout: dict[int, float] = field(default_factory=dict)
    heldout_rounding: dict[int, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def usual_distance(steps: Iterable[int]) -> int:
    """Return the most frequent distance between successive records (the smallest if several are
    equally frequent); 1 for a single record."""
    counts = Counter(b - a for a, b in pairwise(sorted(set(steps))))
    return min(counts, key=lambda gap: (-counts[gap], gap), default=1)


def with_windows(
    steps: Sequence[LoggedStep], how: HowLogged, *, whole: bool = False, ends: Iterable[int] = ()
) -> list[LoggedStep]:
    """Return the records of a log of means, each with the steps that its loss covers.

    A mean begins after the record before, or after the last resume or end of training between the
    two, which reset the sum. The begin is unknown for a record that goes back to an earlier step,
    and for the first one of a log that begins in the middle of a run.

    Args:
        steps: in the order of the file.
        whole: the log begins with the run's first step.
        ends: steps at which training ended, and was continued later.
    """
    usual = how.mean_over or usual_distance(each.step for each in steps)
    starts = {*how.resumed_at, *ends}
    begins = whole or bool(steps and steps[0].step <= usual)
    before: int | None = 0 if begins else None
    found = []
    for each in steps:
        if before is not None and before >= each.step:
            before = None
        known = [start for start in starts if (before or 0) < start < each.step]
        known += [] if before is None else [before]
        over = min(each.step - max(known), how.mean_over or each.step) if known else None
        found.append(replace(each, mean_over=1 if usual == 1 and over is None else over))
        before = each.step
    return found


def tell_means(log: Log) -> None:
    """Add a note that losses are means, and how many can't be compared."""
    most = max((logged.mean_over or 1 for logged in log.steps), default=1)
    if most > 1:
        log.notes.append(f"its losses are means over the steps since its last log (up to {most})")
    unknown = sum(each.mean_over is None for each in log.steps)
    if unknown:
        log.notes.append(
            f"{unknown:,} of its losses are means over an unknown number of steps, since the log "
            "begins or goes back in the middle of the run: not compared"
        )
