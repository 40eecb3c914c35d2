"""Work of the first process: the others hear that it lives, and get its answer, once."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from torchprime.training import agreeing
from torchprime.training.agreeing import LongWork


class Group:
    """Ranks that are threads; who exchanges out of turn is found."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size, timeout=20), [None] * size
        self.exchanges = 0


class Rank:
    def __init__(self, group: Group, index: int) -> None:
        self.group, self.process_index = group, index
        self.process_count = len(group.slots)
        self.busy = threading.Lock()

    def gather_objects(self, value: Any, *, aside: bool = False) -> list[Any]:
        assert self.busy.acquire(blocking=False), "two threads of a rank exchange at a time"
        try:
            self.group.slots[self.process_index] = value
            self.group.barrier.wait()
            found = list(self.group.slots)
            self.group.barrier.wait()
            self.group.exchanges += self.process_index == 0
            return found
        finally:
            self.busy.release()


def test_all_get_the_answer_of_work_that_takes_many_pulses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreeing, "PULSE", 0.01)
    group = Group(3)

    def work(index: int) -> str:
        backend: Any = Rank(group, index)
        work = LongWork(backend)
        if index == 0:
            work.others_wait()
            time.sleep(0.2)
        return work.end(f"answer {index}")

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == ["answer 0"] * 3
    assert group.exchanges > 2


def test_no_other_gives_signs_of_life() -> None:
    backend: Any = Rank(Group(2), 1)
    with pytest.raises(AssertionError, match="only the first process"):
        LongWork(backend).others_wait()
