"""What only the first process does, for all: its result reaches them, and so does its failure."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torchprime.errors import RuntimeSetupError, UserError
from torchprime.training.backend import Backend

Made = TypeVar("Made")


def from_first(backend: Backend, part: Callable[[], Made]) -> Made:
    """Run `part` on the first process and return what it makes on every one; all must call it.

    Raises:
        Exception: what `part` raised, there; elsewhere the same if it is a UserError, else a
            RuntimeSetupError that tells it, since other exceptions may not travel.
    """
    if backend.process_count == 1:
        return part()
    made: Made | None = None
    problem: Exception | None = None
    if backend.process_index == 0:
        try:
            made = part()
        except Exception as error:  # told to the others first: none of them waits for ever
            problem = error
    told = problem
    if problem is not None and not isinstance(problem, UserError):
        told = RuntimeSetupError(f"the first process ended: {problem!r}")
    made, told = backend.gather_objects((made, told))[0]
    if problem is not None or told is not None:
        raise problem or told  # type: ignore[misc]
    return made  # type: ignore[return-value]
