"""The hook that writes checkpoints: every N steps or minutes, at a new best step, on request, at
the end.

A request is a signal (SIGTERM, which preempted machines get, or SIGINT): the current step is
finished, a checkpoint is written and the run ends with its own exit code. A second signal ends it
at once. The other request is a file, `checkpoint.now` in the run's folder, after which the run
continues. With several processes any of them may be asked; they agree at logged steps, where the
host waits anyway.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from torchprime.errors import StoppedError
from torchprime.metrics.goodput import CHECKPOINT
from torchprime.metrics.record import CheckpointRecord
from torchprime.training.backend import Backend
from torchprime.training.hooks.snapshots import Snapshots
from torchprime.training.hooks.times import TimesHook
from torchprime.training.loop import BaseHook
from torchprime.training.run.saver import Saver

NOW_FILE = "checkpoint.now"
SIGNALS = (signal.SIGTERM, signal.SIGINT)
GO_ON, SAVE, STOP = range(3)


class StopSignals:
    """Handler that records the first signal; the second ends the process at once."""

    def __init__(self) -> None:
        self.received: str | None = None
        self._before: dict[int, Any] = {}

    def watch(self) -> None:
        """Install the handler; only Python's main thread may."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def release(self) -> None:
        """Restore the previous handlers."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        if self.received is not None:
            os.write(2, f"\n{name} again: stopping at once, unsaved\n".encode())
            os._exit(128 + number)
        self.received = name
        text = f"\n{name}: finishing the step, then a checkpoint; press again to stop at once\n"
        os.write(2, text.encode())  # print is not safe in signal handlers


@dataclass(frozen=True)
class SaveSchedule:
    """The times at which a run writes checkpoints, besides its end.

    Attributes:
        best: if true, a step that is the best so far is saved too.
        logging_steps: processes agree on requests at these steps.
    """

    every_steps: int | None
    every_minutes: float | None
    best: bool
    logging_steps: int

    @property
    def expects_any(self) -> bool:
        """True if a checkpoint is due before the end."""
        return self.every_steps is not None or self.every_minutes is not None or self.best


class CheckpointHook(BaseHook):
    """Hook that decides after each step; `Saver` writes.

    Args:
        folder: of the run.
        times: the account of the run's wall clock, written after each checkpoint.
        emit: writes a record.
    """

    def __init__(
        self,
        backend: Backend,
        saver: Saver,
        snapshots: Snapshots,
        schedule: SaveSchedule,
        folder: Path,
        times: TimesHook,
        emit: Callable[[CheckpointRecord], None],
    ) -> None:
        self.times = times
        self.backend, self.saver, self.snapshots = backend, saver, snapshots
        self.schedule, self.now_file, self.emit = schedule, folder / NOW_FILE, emit
        self.signals = StopSignals()
        self._saved_at = time.monotonic()  # a monotonic clock, which nobody can set

    def on_start(self) -> None:
        self.signals.watch()
        if self.schedule.expects_any:
            self.saver.reserve()

    def after_step(self, step: int, last: bool) -> None:
        asked = self._asked(step, last)
        every = self.schedule.every_steps
        due = last or (every is not None and step % every == 0)
        due = due or (self.schedule.best and self.saver.is_best(self.snapshots.scores(step)))
        if due or asked != GO_ON:
            self._save(step, wait=last or asked == STOP)
        for record in self.saver.finished():
            self.emit(record)
        if asked == STOP and not last:
            self.saver.require()
            raise StoppedError(
                f"{self.signals.received or 'asked by another process'} after step {step}; "
                "everything is saved, and the same command resumes from there."
            )

    def on_end(self) -> None:
        self.signals.release()
        with self.times.ledger.at(CHECKPOINT):
            self.saver.close()

    def _asked(self, step: int, last: bool) -> int:
        """Return the strongest request that any process got."""
        processes = self.backend.processes
        if processes.count > 1 and not last and step % self.schedule.logging_steps:
            return GO_ON
        wish = GO_ON
        if self.backend.preempted(step) or self.signals.received is not None:
            wish = STOP
        elif processes.index == 0:
            minutes = self.schedule.every_minutes
            late = minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes
            if self._is_asked_by_file() or late:
                wish = SAVE
        return processes.largest(wish)

    def _is_asked_by_file(self) -> bool:
        """Return True if `checkpoint.now` existed; it is removed, also if it is a link or a
        pipe."""
        if not os.path.lexists(self.now_file):
            return False
        try:
            self.now_file.unlink()
        except OSError:  # a folder or not removable: it would ask at every step
            return False
        return True

    def _save(self, step: int, wait: bool) -> None:
        self._saved_at = time.monotonic()
        self.backend.synchronize()  # unfinished steps count as the steps' time
        with self.times.ledger.at(CHECKPOINT):
            self.saver.save(self.snapshots.take(step), wait=wait)
        self.times.write(step)
