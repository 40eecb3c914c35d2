"""The hook that appends the uses of the run's wall clock to times.jsonl (metrics/goodput.py)."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

from torchprime.metrics.goodput import TIMES, Ledger
from torchprime.metrics.record import StepRecord
from torchprime.metrics.writers import JsonlWriter
from torchprime.training.loop import BaseHook


class TimesHook(BaseHook):
    """Hook that writes a record at the start, at every logged step, when asked and at the end.

    Args:
        folder: the run's; None for a process that writes nothing.
        first_step: the updates before this start.
    """

    def __init__(self, ledger: Ledger, folder: Path | None, first_step: int) -> None:
        self.ledger, self.first_step, self.step = ledger, first_step, first_step
        self._path = None if folder is None else folder / TIMES
        self._writer: JsonlWriter | None = None

    def on_start(self) -> None:
        if self._path is not None:
            self._writer = JsonlWriter(self._path)
        self.write(self.first_step)

    def on_record(self, record: StepRecord) -> None:
        self.write(record.step)

    def after_step(self, step: int, last: bool) -> None:
        self.step = step

    def write(self, step: int) -> None:
        """Write the seconds so far, after this many updates."""
        if self._writer is not None:
            self._writer.write(self.ledger.record(step, self.first_step))

    def on_end(self) -> None:
        self.write(self.step)
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def write_last(self) -> None:
        """Write the seconds until now, after the end of the loop."""
        if self._path is not None:
            with closing(JsonlWriter(self._path)) as self._writer:
                self.write(self.step)
            self._writer = None
