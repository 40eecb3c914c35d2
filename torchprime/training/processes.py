"""The processes of a run and the ways in which they agree, all over one primitive: `gather`.

Every process makes the same calls in the same order. Errors that one process raises for all are
raised on all, so that none waits for another that has left.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, TypeVar

from torchprime.errors import RuntimeSetupError, UserError

Made = TypeVar("Made")
PULSE = 1.0  # seconds between two messages of a first process that works while others wait


class Processes(ABC):
    """The processes of one run, seen from one of them.

    Attributes:
        index: of this process; the first one, 0, writes files and talks to the user.
        aside: the same processes for a thread that runs beside the loop: its objects are never
            confused with those of the loop. One thread at a time.
    """

    def __init__(self, index: int, count: int, aside: Processes | None = None) -> None:
        self.index, self.count = index, count
        self.aside = self if aside is None else aside

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Return on every process the values of all processes, in the order of processes.

        Args:
            value: anything that pickle can write.
        """

    def largest(self, value: int) -> int:
        """Return the largest of all processes' values."""
        return max(self.gather(value))

    def first_does(self, action: Callable[[], Made]) -> Made:
        """Run `action` on the first process and return its result on every process.

        The action may take longer than a collective: it sends the others a message every second.

        Raises:
            Exception: what `action` raised, on every process; see `_travelling`.
        """
        if self.count == 1:
            return action()
        work = LongWork(self)
        made: Made | None = None
        problem: Exception | None = None
        if self.index == 0:
            work.others_wait()
            try:
                made = action()
            except Exception as error:  # sent to the others first: none waits for ever
                problem = error
        made, told = work.end((made, problem and _travelling(problem, "the first process")))
        if work.lost is not None:
            raise work.lost
        if problem is not None or told is not None:
            raise problem or told  # type: ignore[misc]
        return made  # type: ignore[return-value]

    def each_does(self, action: Callable[[], Made]) -> Made:
        """Run `action` on every process and return this process's result.

        Raises:
            Exception: on every process, what the first of those that failed raised; see
                `_travelling`.
        """
        if self.count == 1:
            return action()
        made: Made | None = None
        problem: Exception | None = None
        try:
            made = action()
        except Exception as error:
            problem = error
        told = self.gather(problem and _travelling(problem, f"process {self.index}"))
        for index, error in enumerate(told):
            if error is not None:
                raise problem if index == self.index and problem is not None else error
        return made  # type: ignore[return-value]


class OneProcess(Processes):
    """A run of a single process."""

    def __init__(self) -> None:
        super().__init__(index=0, count=1)

    def gather(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]


class LongWork:
    """Work of the first process that may take longer than a collective, such as an export.

    The other processes wait for its end and receive a message every second. If it dies or hangs,
    their next exchange fails like any other. All processes call `end`; only the first calls
    `others_wait`, when the others have no further part in the work.

    Attributes:
        lost: on the first process, the error by which it noticed that others are gone.
    """

    def __init__(self, processes: Processes) -> None:
        self.processes = processes
        self.lost: Exception | None = None
        self._done = threading.Event()
        self._answer: Any = None
        self._thread: threading.Thread | None = None

    def others_wait(self) -> None:
        """Start to send messages, from a thread."""
        # On another process the thread and `end` would exchange objects at the same time, in any
        # order.
        assert self.processes.index == 0, "only the first process sends them"
        if self._thread is None and self.processes.count > 1:
            self._thread = threading.Thread(target=self._beat, name="long-work", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        try:
            while True:
                done = self._done.wait(PULSE)
                self.processes.gather((done, self._answer if done else None))
                if done:
                    return
        except Exception as error:  # the work continues nevertheless
            self.lost = error

    def end(self, answer: Made) -> Made:
        """Return on every process the value that the first one passes.

        Raises:
            Exception: on the others, that the first is lost.
        """
        if self.processes.count == 1:
            return answer
        if self.processes.index == 0:
            self._answer = answer
            self._done.set()
            self.others_wait()
            assert self._thread is not None
            self._thread.join()
            return answer
        while True:
            done, told = self.processes.gather((False, None))[0]
            if done:
                return told


def _travelling(error: Exception, who: str) -> Exception:
    """Return the error that the other processes raise: the same if it is a UserError or a plain
    OSError, else a RuntimeSetupError that tells it, since other exceptions may not travel."""
    plain = isinstance(error, OSError) and type(error).__module__ == "builtins"
    if plain or isinstance(error, UserError):
        return error
    return RuntimeSetupError(f"{who} ended: {error!r}")
