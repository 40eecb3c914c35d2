"""The hook that passes every record to the writers; only the first process writes."""

from __future__ import annotations

from collections.abc import Sequence

from torchprime.metrics.record import Record, SpikeRecord, StepRecord
from torchprime.metrics.writers import Writer
from torchprime.training.loop import BaseHook


class MetricsHook(BaseHook):
    """Hook that passes to the writers step records as they come, and whatever other hooks
    `emit`."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = writers
        self.last: StepRecord | None = None

    def on_record(self, record: StepRecord) -> None:
        self.last = record
        self.emit(record)

    def on_spike(self, record: SpikeRecord) -> None:
        self.emit(record)

    def emit(self, record: Record) -> None:
        """Write a record of any kind."""
        for writer in self.writers:
            writer.write(record)

    def sync(self) -> None:
        """Wait until all records so far are on the disk."""
        for writer in self.writers:
            writer.sync()

    def on_end(self) -> None:
        """Flush and close the writers."""
        for writer in self.writers:
            writer.close()
