"""The thread between the loop and a tracker: the loop never waits, and a failure is one line."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from torchprime.metrics.record import EvalRecord, StepRecord
from torchprime.metrics.trackers.sender import Sender, finish
from torchprime.metrics.trackers.tracker import Outcome, Table

SCORE = {"value": 0.5, "count": 2, "low": 0.1, "high": 0.9, "interval": "wilson"}
EVAL = EvalRecord(10, math.log(4), 1500, 2.0, scores={"exact": SCORE})  # type: ignore[dict-item]
ANSWERS = Table(["row_id", "exact"], [["a", 1.0]])


class Double:
    """A tracker that notes its calls; `act` runs in each, with the method's name."""

    name = "double"

    def __init__(self, act: Callable[[str], None] = lambda method: None) -> None:
        self.act = act
        self.calls: list[tuple[object, ...]] = []

    def _call(self, *call: object) -> None:
        self.act(str(call[0]))
        self.calls.append(call)

    def open(self) -> str:
        self._call("open")
        return "double: run 1"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._call("log", step, dict(values))

    def table(self, step: int, table: Table) -> None:
        self._call("table", step, table)

    def artifact(self, files: Sequence[Path]) -> None:
        self._call("artifact", list(files))

    def close(self, outcome: Outcome) -> None:
        self._call("close", outcome)


def raising_in(wanted: str, error: BaseException) -> Callable[[str], None]:
    def act(method: str) -> None:
        if method == wanted:
            raise error

    return act


def test_the_tracker_gets_everything_in_order(step_record: StepRecord, tmp_path: Path) -> None:
    tracker, said = Double(), []
    sender = Sender(tracker, said.append, lambda step: ANSWERS)
    sender.write(step_record)
    sender.write(EVAL)
    sender.write(replace(EVAL, step=20, scores=None))
    sender.close()  # the loop's end: the report comes later
    finish([sender], "finished", [tmp_path], seconds=10)
    assert [call[0] for call in tracker.calls] == [
        *("open", "log", "log", "table", "log", "artifact", "close")
    ]
    assert tracker.calls[1][1:] == (10, pytest.approx(tracker.calls[1][2]))
    values = tracker.calls[2][2]
    assert isinstance(values, dict)
    assert values["eval/exact"] == 0.5
    assert values["eval/loss"] == pytest.approx(math.log(4))
    assert tracker.calls[3] == ("table", 10, ANSWERS)
    assert tracker.calls[-1] == ("close", "finished")
    assert said == ["double: run 1"]


@pytest.mark.parametrize("method", ["open", "log", "table", "artifact", "close"])
@pytest.mark.parametrize("error", [OSError("no route\nto host."), SystemExit("usage")])
def test_a_tracker_that_fails_is_one_line_and_gets_nothing_more(
    method: str, error: BaseException, step_record: StepRecord, tmp_path: Path
) -> None:
    tracker, said = Double(raising_in(method, error)), []
    sender = Sender(tracker, said.append, lambda step: ANSWERS)
    for step in range(1, 4):
        sender.write(replace(step_record, step=step))
        sender.write(replace(EVAL, step=step))
    finish([sender], "finished", [tmp_path], seconds=10)
    sender.write(step_record)
    told = [line for line in said if line != "double: run 1"]
    why = "OSError: no route to host" if isinstance(error, OSError) else "SystemExit: usage"
    assert told == [f"double: {why}. The run continues without it; metrics.jsonl has every record"]
    assert not any(call[0] == method for call in tracker.calls)
    if method != "close":
        assert not any(call[0] == "close" for call in tracker.calls)


def test_samples_that_cannot_be_read_do_not_end_the_run(step_record: StepRecord) -> None:
    def unreadable(step: int) -> Table:
        raise OSError("gone")

    said: list[str] = []
    sender = Sender(Double(), said.append, unreadable)
    sender.write(EVAL)
    finish([sender], "finished", [], seconds=10)
    assert "gone" in said[-1]


def test_a_tracker_that_hangs_neither_slows_the_loop_nor_keeps_the_run(
    step_record: StepRecord,
) -> None:
    hanging = threading.Event()
    said: list[str] = []
    senders = [Sender(Double(lambda method: void(hanging.wait(60))), said.append) for _ in "ab"]
    started = time.perf_counter()
    for sender in senders:
        for _ in range(1000):
            sender.write(step_record)
    written = time.perf_counter() - started
    finish(senders, "finished", [], seconds=0.2)
    ended = time.perf_counter() - started
    hanging.set()
    assert written < 0.5, "2,000 records; each would have waited a minute"
    assert ended < 1.5, "both share the 0.2 s"
    told = "has not finished in time (metrics.finish_seconds), and is left"
    assert [told in line for line in said] == [True, True]


def void(value: object) -> None:
    """Take a value and return none."""


def test_what_a_slow_tracker_misses_is_counted(step_record: StepRecord) -> None:
    go = threading.Event()
    tracker, said = Double(lambda method: void(go.wait(60))), []
    sender = Sender(tracker, said.append, room=3)
    for step in range(1, 11):
        sender.write(replace(step_record, step=step))
    sender.ask_to_finish("finished")
    go.set()
    sender.wait(time.monotonic() + 10)
    logged = [call[1] for call in tracker.calls if call[0] == "log"]
    assert tracker.calls[-1] == ("close", "finished"), "the end is told even if the queue is full"
    lost = 10 - len(logged)
    assert lost >= 7
    assert said[-1] == f"double: was too slow for {lost} records; metrics.jsonl has every record"
