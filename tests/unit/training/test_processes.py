"""Agreement of processes: the same results and the same errors on all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from torchprime.errors import CheckpointError, RuntimeSetupError
from torchprime.training import processes
from torchprime.training.processes import LongWork, OneProcess, Processes


class Group:
    """Ranks that are threads; who exchanges out of turn is found."""

    def __init__(self, size: int) -> None:
        self.barrier, self.slots = threading.Barrier(size, timeout=20), [None] * size
        self.exchanges = 0


class Rank(Processes):
    def __init__(self, group: Group, index: int) -> None:
        super().__init__(index, len(group.slots))
        self.group, self.busy = group, threading.Lock()

    def gather(self, value: Any) -> list[Any]:
        assert self.busy.acquire(blocking=False), "two threads of a rank exchange at a time"
        try:
            self.group.slots[self.index] = value
            self.group.barrier.wait()
            found = list(self.group.slots)
            self.group.barrier.wait()
            self.group.exchanges += self.index == 0
            return found
        finally:
            self.busy.release()


def on_all(part: Callable[[Rank], Any], size: int = 3) -> list[Any]:
    """Return what `part` returns or raises on each of a group's ranks."""
    group = Group(size)

    def outcome(index: int) -> Any:
        try:
            return part(Rank(group, index))
        except BaseException as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(outcome, range(size)))


def raising(error: BaseException) -> Callable[[], Any]:
    def action() -> Any:
        raise error

    return action


# Work of the first process ------------------------------------------------------------------------


def test_all_get_the_answer_of_work_that_takes_many_pulses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PULSE", 0.01)
    group = Group(3)

    def work(index: int) -> str:
        work = LongWork(Rank(group, index))
        if index == 0:
            work.others_wait()
            time.sleep(0.2)
        return work.end(f"answer {index}")

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(work, range(3))) == ["answer 0"] * 3
    assert group.exchanges > 2


def test_no_other_gives_signs_of_life() -> None:
    with pytest.raises(AssertionError, match="only the first process"):
        LongWork(Rank(Group(2), 1)).others_wait()


def test_the_first_does_and_all_get_the_result() -> None:
    done: list[int] = []

    def part(rank: Rank) -> str:
        return rank.first_does(lambda: f"by {rank.index} of {done.append(rank.index) or 3}")

    assert on_all(part) == ["by 0 of 3"] * 3
    assert done == [0]


@pytest.mark.parametrize("error", [CheckpointError("no space"), PermissionError(13, "no", "file")])
def test_a_users_or_a_disks_error_on_the_first_is_raised_on_all(error: Exception) -> None:
    found = on_all(lambda rank: rank.first_does(raising(error)))
    assert found == [error] * 3


class LibraryError(OSError):
    """An error that may hold anything, so that it can't be sent."""


@pytest.mark.parametrize("error", [KeyError("x"), LibraryError("y")])
def test_a_bug_on_the_first_is_told_to_the_others(error: Exception) -> None:
    first, *others = on_all(lambda rank: rank.first_does(raising(error)))
    assert first is error
    for other in others:
        assert isinstance(other, RuntimeSetupError)
        assert str(other) == f"the first process ended: {error!r}"


def test_an_interrupt_of_the_first_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PULSE", 0.01)
    group = Group(2)
    group.barrier = threading.Barrier(2, timeout=1)

    def part(index: int) -> Any:
        try:
            return Rank(group, index).first_does(raising(KeyboardInterrupt()))
        except KeyboardInterrupt as error:
            group.barrier.abort()  # the process ends
            return error
        except threading.BrokenBarrierError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        first, other = pool.map(part, range(2))
    assert isinstance(first, KeyboardInterrupt)
    assert isinstance(other, threading.BrokenBarrierError)


def test_the_first_notices_that_others_are_gone() -> None:
    group = Group(2)
    group.barrier.abort()
    with pytest.raises(threading.BrokenBarrierError):
        Rank(group, 0).first_does(lambda: "done")


# Work of every process ----------------------------------------------------------------------------


def test_each_process_gets_its_own_result() -> None:
    def part(rank: Rank) -> Any:
        return rank.each_does(lambda: (rank.index, raising))

    assert on_all(part) == [(0, raising), (1, raising), (2, raising)]


def test_the_first_error_of_any_process_is_raised_on_all() -> None:
    errors = {1: CheckpointError("it is not there"), 2: KeyError("x")}

    def part(rank: Rank) -> Any:
        return rank.each_does(raising(errors[rank.index]) if rank.index in errors else list)

    assert on_all(part) == [errors[1]] * 3
    del errors[1]
    zero, one, two = on_all(part)
    assert two is errors[2]
    assert str(zero) == str(one) == "process 2 ended: KeyError('x')"
    assert isinstance(zero, RuntimeSetupError)


def test_the_largest_of_all() -> None:
    assert on_all(lambda rank: rank.largest([3, 7, 5][rank.index])) == [7, 7, 7]


# One process --------------------------------------------------------------------------------------


def test_one_process_agrees_with_itself() -> None:
    one = OneProcess()
    assert (one.index, one.count, one.aside) == (0, 1, one)
    assert one.gather("value") == ["value"] and one.largest(3) == 3
    assert one.first_does(lambda: "done") == one.each_does(lambda: "done") == "done"
    assert LongWork(one).end("answer") == "answer"
    for agree in (one.first_does, one.each_does):
        with pytest.raises(KeyError):
            agree(raising(KeyError("as it is")))
