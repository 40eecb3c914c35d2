"""Work of the first process for all: every process gets its result, or its failure."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

from torchprime.errors import RuntimeSetupError, UserError
from torchprime.training.backend import Backend

Made = TypeVar("Made")
PULSE = 1.0  # seconds between two signs of life of a first process that works while others wait


class LongWork:
    """Work of the first process that may take longer than a collective, such as an export.

    The other processes wait for its end and receive signs of life meanwhile. If it dies or hangs,
    their next exchange fails like any other. All processes call `end`; only the first calls
    `others_wait`, when the others have no further part in the work.

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
        """Start to send signs of life, from a thread."""
        # With other backends the thread and `end` would exchange objects at the same time, in any
        # order.
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
        except Exception as error:  # the work continues nevertheless
            self.lost = error

    def end(self, answer: Made) -> Made:
        """Return on every process the value that the first one passes.

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
    """Run `part` on the first process and return its result on every process; all must call it.

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
        except Exception as error:  # sent to the others first: none waits for ever
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
