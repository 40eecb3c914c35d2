"""What only the first process does, for all: its result reaches them, and so does its failure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torchprime.errors import RuntimeSetupError, UserError
from torchprime.training.backend import Backend

Made = TypeVar("Made")
PULSE = 1.0  # seconds between two signs of life of a first process that works while others wait


class LongWork:
    """Work of the first process that may take longer than a collective: an export, say, or the
    hashes of a checkpoint.

    The others wait for its end and hear meanwhile that it lives. If it dies or hangs, their next
    exchange ends as any other does. All processes call `end`; only the first calls `others_wait`,
    when the others have no further part in the work.

    Attributes:
        lost: on the first process, the error by which it noticed that others are gone.
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.lost: Exception | None = None
        self._done = threading.Event()
        self._answer: Any = None
        self._thread: threading.Thread | None = None

    def others_wait(self) -> None:
        """Begin to give signs of life, from a thread."""
        # Elsewhere the thread and `end` would exchange objects at the same time, in any order.
        assert self.backend.process_index == 0, "only the first process gives signs of life"
        if self._thread is None and self.backend.process_count > 1:
            self._thread = threading.Thread(target=self._beat, name="long-work", daemon=True)
            self._thread.start()

    def _beat(self) -> None:
        try:
            while True:
                done = self._done.wait(PULSE)
                self.backend.gather_objects((done, self._answer if done else None))
                if done:
                    return
        except Exception as error:  # the work goes on all the same
            self.lost = error

    def end(self, answer: Made) -> Made:
        """Return on every process the answer that the first one gives.

        Raises:
            Exception: on the others, that the first is lost.
        """
        if self.backend.process_count == 1:
            return answer
        if self.backend.process_index == 0:
            self._answer = answer
            self._done.set()
            self.others_wait()
            assert self._thread is not None
            self._thread.join()
            return answer
        while True:
            done, told = self.backend.gather_objects((False, None))[0]
            if done:
                return told


def from_first(backend: Backend, part: Callable[[], Made]) -> Made:
    """Run `part` on the first process and return what it makes on every one; all must call it.

    Raises:
        Exception: what `part` raised, there; elsewhere the same if it is a UserError, else a
            RuntimeSetupError that tells it, since other exceptions may not travel.
    """
    if backend.process_count == 1:
        return part()
    work = LongWork(backend)
    made: Made | None = None
    problem: Exception | None = None
    if backend.process_index == 0:
        work.others_wait()
        try:
            made = part()
        except Exception as error:  # told to the others first: none of them waits for ever
            problem = error
    told = problem
    if problem is not None and not isinstance(problem, UserError):
        told = RuntimeSetupError(f"the first process ended: {problem!r}")
    made, told = work.end((made, told))
    if work.lost is not None:
        raise work.lost
    if problem is not None or told is not None:
        raise problem or told  # type: ignore[misc]
    return made  # type: ignore[return-value]
