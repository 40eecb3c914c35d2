"""The state of a run, read from its folder while the run writes it.

`torchprime watch` calls `LiveRun.update` again and again. Only new lines are read. A line that is
being written waits until it is whole. A resumed run replaces metrics.jsonl, cut to its checkpoint:
the file is then read from its beginning. A missing file is no error, since a run creates its files
one after another.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torchprime.errors import DataError
from torchprime.files.atomic import open_regular, read_regular_text
from torchprime.metrics.goodput import TIMES
from torchprime.metrics.record import EvalRecord, StepRecord, TimeRecord, from_json

METRICS, FACTS = "metrics.jsonl", "run.json"
REPORT = "report.md"  # report/write.py needs what this module does not: seconds to import
KEPT_BYTES = 256  # before the place read up to, compared to notice a file that was replaced
MOST_AT_ONCE = 64 << 20  # bytes of new lines that are read in one go
RATES = 5  # records whose median is the time of a step


@dataclass
class _Tail:
    """The new lines of a file that grows."""

    path: Path
    offset: int = 0
    before: bytes = b""  # the last bytes before the offset

    def read(self) -> tuple[bool, list[str]]:
        """Return True if the file was replaced since the last call, and its new whole lines."""
        try:
            file = open_regular(self.path)
        except FileNotFoundError:
            replaced = self.offset > 0
            self.offset, self.before = 0, b""
            return replaced, []
        with file:
            replaced = not self._is_known(file.fileno())
            if replaced:
                self.offset, self.before = 0, b""
            file.seek(self.offset)
            data = file.read(MOST_AT_ONCE)
        whole = data[: data.rfind(b"\n") + 1]
        self.offset += len(whole)
        self.before = (self.before + whole)[-KEPT_BYTES:]
        return replaced, whole.decode("utf-8", "replace").split("\n")[:-1]

    def _is_known(self, descriptor: int) -> bool:
        start = self.offset - len(self.before)
        return os.pread(descriptor, len(self.before), start) == self.before


@dataclass
class LiveRun:
    """The newest records of a run, and the curve of its loss.

    Attributes:
        now: seconds since 1970; a test may give its own clock.
        losses: (step, loss) of each logged step.
        total: the planned steps; None before run.json is there.
        starts: the step before each start.
        changed: seconds since 1970 of the newest record.
        finished: the run has written its report after its last record.
    """

    folder: Path
    now: Callable[[], float] = time.time
    losses: list[tuple[int, float]] = field(default_factory=list)
    recent: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvalRecord] = field(default_factory=list)
    checkpoint: Mapping[str, Any] | None = None
    times: TimeRecord | None = None
    total: int | None = None
    starts: list[int] = field(default_factory=list)
    about: str = ""
    changed: float | None = None
    finished: bool = False

    def __post_init__(self) -> None:
        self._metrics = _Tail(self.folder / METRICS)
        self._times = _Tail(self.folder / TIMES)
        self._facts_read: int | None = None

    @property
    def is_there(self) -> bool:
        """Return True if the run has written its run.json."""
        return self.total is not None

    def update(self) -> list[dict[str, Any]]:
        """Read what is new, and return the new records of metrics.jsonl.

        Raises:
            DataError: a file is not as a run writes it; naming the file.
        """
        try:
            self._read_facts()
            new = self._read_metrics()
            self._read_times()
        except OSError as error:
            raise DataError(f"{error.filename or self.folder}: {error.strerror}") from error
        self._read_changes()
        return new

    def seconds_per_step(self) -> float | None:
        """Return the median of the last records' time per step."""
        seconds = sorted(record.step_seconds for record in self.recent)
        return seconds[len(seconds) // 2] if seconds else None

    def _read_facts(self) -> None:
        try:
            written = (self.folder / FACTS).stat().st_mtime_ns
            if written == self._facts_read:
                return
            facts = json.loads(read_regular_text(self.folder / FACTS))
            self._facts_read = written
        except FileNotFoundError:
            return
        except ValueError as error:
            raise DataError(
                f"{self.folder / FACTS}: expected the JSON of a run: {error}"
            ) from error
        try:
            self.total = int(facts["plan"]["total_steps"])
            self.starts = [int(start["step"]) for start in facts["starts"]]
            device = facts["device"]
            base = facts["model"]["pretrained"] or "random weights"
            base = Path(base).name if Path(base).is_absolute() else base
            self.about = f"{base}, {facts['backend']} on {device['count']} x {device['kind']}"
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(
                f"{self.folder / FACTS}: lacks what a run writes there ({error!r})"
            ) from error

    def _read_metrics(self) -> list[dict[str, Any]]:
        replaced, lines = self._metrics.read()
        if replaced:
            self.losses, self.recent, self.evaluations = [], [], []
            self.checkpoint = None
        new = [_record(self.folder / METRICS, line) for line in lines]
        for record in new:
            try:
                self._add(record)
            except (KeyError, TypeError) as error:
                raise DataError(
                    f"{self.folder / METRICS}: given {str(record)[:80]}, expected a record as the "
                    f"run writes it ({error!r})"
                ) from error
        return new

    def _add(self, record: dict[str, Any]) -> None:
        if record["kind"] == "train":
            step = StepRecord.from_dict(record)
            self.losses.append((step.step, step.loss))
            self.recent = [*self.recent, step][-RATES:]
        elif record["kind"] == "eval":
            self.evaluations.append(EvalRecord.from_dict(record))
        elif record["kind"] == "checkpoint":
            self.checkpoint = record

    def _read_times(self) -> None:
        _, lines = self._times.read()
        if lines:
            try:
                self.times = TimeRecord.from_dict(_record(self.folder / TIMES, lines[-1]))
            except TypeError as error:
                raise DataError(f"{self.folder / TIMES}: {error}") from error

    def _read_changes(self) -> None:
        times = {name: _written(self.folder / name) for name in (METRICS, FACTS, REPORT)}
        self.changed = times[METRICS]
        report = times[REPORT]
        others = [each for name in (METRICS, FACTS) if (each := times[name]) is not None]
        self.finished = report is not None and all(report >= each for each in others)


def _record(path: Path, line: str) -> dict[str, Any]:
    try:
        return from_json(line)
    except ValueError as error:
        raise DataError(
            f"{path}: given {line[:80]!r}, expected one JSON object as the run writes it ({error})"
        ) from error


def _written(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None
