"""Goodput: the uses of a run's wall clock, over all its starts.

A `Ledger` assigns every second of one process to one of USES. The run appends its state to
times.jsonl, one `TimeRecord` a line, at logged steps and checkpoints; nothing is ever removed from
that file, so a killed process leaves its account. `account` adds the starts up. Whatever a resume
repeats, and the start-up of a resumed run, is `lost`. The goodput is the share of `step`: time in
steps whose work is kept.

While the host waits for a batch, the device may still work on earlier steps, so `data` is an upper
bound. It is near 0 unless batches are built more slowly than steps run.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from torchprime.metrics.record import TimeRecord
from torchprime.metrics.writers import read_metrics

T = TypeVar("T")

TIMES = "times.jsonl"
# start-up, compiling, waiting for a batch, steps, held-out loss and answers, waiting for
# checkpoints, the export, work that a resume repeats, and the rest.
USES: tuple[str, ...] = (
    "start", "compile", "data", "step", "evaluation", "checkpoint", "export", "lost", "other",
)  # fmt: skip
START, COMPILE, DATA, STEP, EVALUATION, CHECKPOINT, EXPORT, LOST, OTHER = USES


@dataclass
class Span:
    """A stretch of time; `use` may change until it ends."""

    use: str


class Ledger:
    """Clock that assigns every second since it was created to one use, the innermost open one.

    Args:
        before: seconds before its creation that belong to the start-up.
    """

    def __init__(self, before: float = 0.0, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._booked = clock()
        self._created, self._before = self._booked, before
        self._open = [Span(START)]
        self._seconds = {START: before}
        self.began = time.time() - before  # in seconds since 1970: names this start of the run

    def begin(self, use: str) -> None:
        """Assign the time from here on to another use, where no `at` is open."""
        self._book()
        self._open[0].use = use

    @contextmanager
    def at(self, use: str | None = None) -> Iterator[Span]:
        """Assign the time inside the context to a use; None stays with the present one."""
        self._book()
        span = Span(use or self._open[-1].use)
        self._open.append(span)
        try:
            yield span
        finally:
            self._book()
            self._open.pop()

    def each(self, use: str, items: Iterator[T]) -> Iterator[T]:
        """Yield the items; the time until each arrives is of this use."""
        while True:
            with self.at(use):
                item = next(items, None)
            if item is None:
                return
            yield item

    def record(self, step: int, first_step: int) -> TimeRecord:
        """Return the seconds by use so far.

        Args:
            step: finished updates.
            first_step: those before this start.
        """
        self._book()
        wall = self._before + self._booked - self._created
        return TimeRecord(step, first_step, self.began, wall, dict(self._seconds))

    def _book(self) -> None:
        now, span = self._clock(), self._open[-1]
        self._seconds[span.use] = self._seconds.get(span.use, 0.0) + now - self._booked
        self._booked = now


@dataclass(frozen=True)
class Goodput:
    """The account of a run.

    Attributes:
        wall_seconds: of all starts together, without the time between them.
        seconds: by USES; they add up to `wall_seconds`.
        starts: the number of starts.
    """

    wall_seconds: float
    seconds: dict[str, float] = field(default_factory=dict)
    starts: int = 1

    @property
    def share(self) -> float:
        """The goodput, from 0 to 1."""
        return self.seconds[STEP] / self.wall_seconds if self.wall_seconds else 0.0

    def to_dict(self) -> dict[str, object]:
        """Return it for run.json."""
        return {
            "share": self.share,
            "wall_seconds": self.wall_seconds,
            "starts": self.starts,
            "seconds": self.seconds,
        }

    def describe(self) -> str:
        """Return one line for the terminal."""
        rest = ", ".join(
            f"{use} {seconds:,.1f}"
            for use, seconds in self.seconds.items()
            if use != STEP and seconds >= 0.05
        )
        return (
            f"goodput {self.share:.1%}: {self.seconds[STEP]:,.1f} of {self.wall_seconds:,.1f} s in "
            f"steps whose work is kept ({rest})"
        )


def account(records: Sequence[TimeRecord]) -> Goodput | None:
    """Return the account of a run from all its records, in their order; None without any."""
    starts = [list(group) for _, group in groupby(records, key=lambda record: record.began)]
    if not starts:
        return None
    total = dict.fromkeys(USES, 0.0)
    for number, start in enumerate(starts):
        later = [other[0].first_step for other in starts[number + 1 :]]
        for use, seconds in _of_start(start, kept_step=min(later, default=None)).items():
            total[LOST if number and use == START else use] += seconds
    return Goodput(sum(start[-1].wall_seconds for start in starts), total, len(starts))


def _of_start(records: Sequence[TimeRecord], kept_step: int | None) -> Mapping[str, float]:
    """Return the seconds of one start by use; those after the step from which a later start
    resumes are lost.

    Args:
        kept_step: None if no later start resumes before its end.
    """
    last = records[-1]
    if kept_step is None or kept_step >= last.step:
        return last.seconds
    if kept_step == 0 and records[0].first_step == 0:  # a run that begins again keeps nothing
        return {LOST: last.wall_seconds}
    kept = [record for record in records if record.step <= kept_step]
    if not kept:
        return {LOST: last.wall_seconds}
    return {**kept[-1].seconds, LOST: last.wall_seconds - kept[-1].wall_seconds}


def read_account(folder: Path) -> Goodput | None:
    """Return the account of a run's folder; None for a run of a version that wrote none."""
    path = folder / TIMES
    if not path.is_file():
        return None
    return account([TimeRecord.from_dict(values) for values in read_metrics(path)])


_process_counted = False


def seconds_since_process_start() -> float:
    """Return the age of this process at the first call; 0 at later ones, and where the system does
    not tell.

    The interpreter and the imports take seconds, which belong to the start-up of the first run.
    """
    global _process_counted
    if _process_counted or not sys.platform.startswith("linux"):
        return 0.0
    _process_counted = True
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
