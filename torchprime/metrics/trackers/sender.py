"""The thread that passes a run's records to one tracker, beside the loop.

    loop  --write, never waits-->  bounded queue  --one thread-->  tracker

A tracker may be slow, hang or raise: the loop does not notice. If the queue is full, records are
dropped and counted. After an exception the tracker gets nothing more. Each of these is one line for
the user, since metrics.jsonl has every record. At the end of the run the thread gets a limited time
to send the rest.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from torchprime.metrics.record import EvalRecord, Record
from torchprime.metrics.trackers.tracker import Outcome, Table, Tracker, scalars

MOST_WAITING = 10_000  # records of some hundred bytes
KEPT = "metrics.jsonl has every record"
Say = Callable[[str], None]


@dataclass(frozen=True)
class _End:
    outcome: Outcome
    files: Sequence[Path]


class Sender:
    """Writer that passes records to a tracker in a thread of its own.

    Args:
        samples: returns the graded answers of a step that has some; called in the thread.
        say: prints a line for the user.
        room: the most records that wait.
    """

    def __init__(
        self,
        tracker: Tracker,
        say: Say,
        samples: Callable[[int], Table] | None = None,
        room: int = MOST_WAITING,
    ) -> None:
        self._tracker, self._say, self._samples = tracker, say, samples
        self._waiting: queue.Queue[Record | _End] = queue.Queue(room)
        self._dropped = 0
        self._failed = threading.Event()
        self._thread = threading.Thread(
            target=self._work, name=f"torchprime-{tracker.name}", daemon=True
        )
        self._thread.start()

    def write(self, record: Record) -> None:
        """Pass a record on without waiting."""
        if self._failed.is_set():
            return
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            self._dropped += 1

    def sync(self) -> None:
        """Do nothing: metrics.jsonl is the primary record."""

    def close(self) -> None:
        """Do nothing: the run's report comes after its last record, see `finish`."""

    def ask_to_finish(self, outcome: Outcome, files: Sequence[Path] = ()) -> None:
        """Let the thread end after the waiting records and these files, without waiting for it."""
        end = _End(outcome, files)
        while not self._failed.is_set():
            try:
                return self._waiting.put_nowait(end)
            except queue.Full:  # the end matters more than the oldest record
                self._dropped += 1
                _discard_one(self._waiting)

    def wait(self, until: float) -> None:
        """Wait for the thread until a time of `time.monotonic`, and tell what was lost."""
        self._thread.join(max(0.0, until - time.monotonic()))
        name = self._tracker.name
        if self._thread.is_alive():
            self._failed.set()
            self._say(
                f"{name}: has not finished in time (metrics.finish_seconds), and is left; {KEPT}"
            )
        elif self._dropped and not self._failed.is_set():
            self._say(f"{name}: was too slow for {self._dropped:,} records; {KEPT}")

    def _work(self) -> None:
        try:
            if (told := self._tracker.open()) is not None:
                self._say(told)
            while not isinstance(item := self._waiting.get(), _End):
                self._pass_on(item)
            if item.files:
                self._tracker.artifact(item.files)
            self._tracker.close(item.outcome)
        except BaseException as error:  # also SystemExit of a library: only this thread ends
            if not self._failed.is_set():
                self._failed.set()
                self._say(
                    f"{self._tracker.name}: {_one_line(error)}. The run continues without it; "
                    f"{KEPT}"
                )

    def _pass_on(self, record: Record) -> None:
        self._tracker.log(record.step, scalars(record))
        if self._samples is not None and isinstance(record, EvalRecord) and record.scores:
            self._tracker.table(record.step, self._samples(record.step))


def finish(
    senders: Sequence[Sender], outcome: Outcome, files: Sequence[Path], seconds: float
) -> None:
    """End all trackers together, in at most so many seconds."""
    for sender in senders:
        sender.ask_to_finish(outcome, files)
    until = time.monotonic() + seconds
    for sender in senders:
        sender.wait(until)


def _discard_one(waiting: queue.Queue[Record | _End]) -> None:
    try:
        waiting.get_nowait()
    except queue.Empty:
        return


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__
