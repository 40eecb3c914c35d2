"""The account of a run's wall clock: one use at a time, and what restarts cost."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from torchprime.metrics import goodput
from torchprime.metrics.goodput import TIMES, USES, Ledger, account, read_account
from torchprime.metrics.record import TimeRecord
from torchprime.metrics.writers import JsonlWriter


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def test_every_second_has_the_innermost_use() -> None:
    clock = Clock()
    ledger = Ledger(2.0, clock)
    clock.now += 1  # start
    ledger.begin("step")
    clock.now += 10
    with ledger.at("evaluation"):
        clock.now += 3
        with ledger.at() as span:
            clock.now += 4
            span.use = "compile"
        clock.now += 5
    with ledger.at() as span:
        clock.now += 6
    items = iter(ledger.each("data", slow(clock, 7, 7)))
    for _ in items:
        clock.now += 1
    ledger.begin("other")
    clock.now += 0.5
    record = ledger.record(9, 4)
    assert record.seconds == {
        "start": 3, "step": 18, "evaluation": 8, "compile": 4, "data": 14, "other": 0.5,
    }  # fmt: skip
    assert record.wall_seconds == sum(record.seconds.values()) == 47.5
    assert (record.step, record.first_step) == (9, 4)


def slow(clock: Clock, *seconds: float):
    for each in seconds:
        clock.now += each
        yield object()


def test_an_error_ends_a_use() -> None:
    clock = Clock()
    ledger = Ledger(clock=clock)
    with pytest.raises(ValueError), ledger.at("export"):
        clock.now += 1
        raise ValueError
    clock.now += 1
    assert ledger.record(0, 0).seconds == {"start": 1, "export": 1}


def record(began: float, first: int, done: int, /, **seconds: float) -> TimeRecord:
    return TimeRecord(done, first, began, sum(seconds.values()), dict(seconds))


def test_one_start() -> None:
    found = account([record(1, 0, 0, start=2), record(1, 0, 5, start=2, step=8)])
    assert found is not None
    assert found.seconds == {**dict.fromkeys(USES, 0), "start": 2, "step": 8}
    assert (found.wall_seconds, found.starts, found.share) == (10, 1, 0.8)
    assert account([]) is None


def test_a_resume_loses_what_it_repeats_and_its_start_up() -> None:
    found = account([
        record(1, 0, 0, start=2),
        record(1, 0, 3, start=2, compile=1, step=6),
        record(1, 0, 5, start=2, compile=1, step=10, data=0.5),  # killed after step 5
        record(2, 3, 3, start=3),
        record(2, 3, 12, start=3, compile=1, step=18),
    ])  # fmt: skip
    assert found is not None
    assert found.seconds == {
        **dict.fromkeys(USES, 0), "start": 2, "compile": 2, "step": 24, "lost": 4.5 + 3,
    }  # fmt: skip
    assert sum(found.seconds.values()) == found.wall_seconds == 13.5 + 22
    assert "24.0 of 35.5 s" in found.describe() and "lost 7.5" in found.describe()


def test_a_run_that_begins_again_keeps_nothing() -> None:
    found = account([
        record(1, 0, 0, start=2), record(1, 0, 5, start=2, step=10),
        record(2, 0, 0, start=1), record(2, 0, 5, start=1, step=9),
    ])  # fmt: skip
    assert found is not None
    assert (found.seconds["lost"], found.seconds["step"], found.seconds["start"]) == (13, 9, 0)


def test_the_earliest_later_start_decides() -> None:
    """A third start from before the second one: its checkpoints were damaged."""
    found = account([
        record(1, 0, 2, step=2), record(1, 0, 6, step=6),
        record(2, 6, 6, start=1), record(2, 6, 8, start=1, step=2),
        record(3, 2, 2, start=1), record(3, 2, 9, start=1, step=7),
    ])  # fmt: skip
    assert found is not None
    assert (found.seconds["step"], found.seconds["lost"]) == (2 + 7, 4 + 3 + 1)


def test_a_start_that_only_exports_keeps_what_was_trained() -> None:
    found = account([
        record(1, 0, 9, start=1, step=9), record(2, 9, 9, start=1, export=2),
    ])  # fmt: skip
    assert found is not None
    assert (found.seconds["step"], found.seconds["export"], found.seconds["lost"]) == (9, 2, 1)


def test_the_file_is_read_back(tmp_path: Path) -> None:
    assert read_account(tmp_path) is None
    writer = JsonlWriter(tmp_path / TIMES)
    writer.write(record(1, 0, 5, start=2, step=8))
    writer.close()
    with open(tmp_path / TIMES, "a") as file:
        file.write('{"kind": "time", "step')  # torn by a kill
    found = read_account(tmp_path)
    assert found is not None and found.share == 0.8


def test_the_age_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(goodput, "_process_counted", False)
    age = goodput.seconds_since_process_start()
    told = subprocess.run(["ps", "-o", "etimes=", "-p", str(os.getpid())], capture_output=True)
    assert age == pytest.approx(int(told.stdout), abs=2)
    assert goodput.seconds_since_process_start() == 0
