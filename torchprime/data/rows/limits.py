"""Limits on one row: characters, and seconds of its chat template.

A tokenizer uses some hundred bytes of memory for each character of a text, so one row of 60 MB can
exhaust the memory of a process. A template is a program by the model's author; nested loops can
keep it busy for any length of time.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from torchprime.data.files.record import Rejection
from torchprime.data.rows.row import Row

REASON_TOO_MANY = "more characters than dataset.max_row_characters"
RENDER_SECONDS = 5.0  # of this process's CPU time; a long conversation takes milliseconds
MOST_RENDERED = 64 * 2**20  # characters of one rendering

_left: list[float] = []  # seconds left for the row being rendered


class TooSlow(Exception):
    """A row's renderings took more than RENDER_SECONDS."""


def characters(row: Row) -> int:
    """Count the characters of all texts of a row."""
    count = len(row.prompt) + len(row.completion)
    if row.messages:
        count += sum(_characters(message.template) for message in row.messages)
        count += _characters(row.tools)
    return count


def too_long(row: Row, count: int) -> Rejection:
    """Return the rejection of a row with too many characters, or None."""
    return Rejection(row.row_id, REASON_TOO_MANY, f"{count:,} characters")


def _characters(value: Any) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + _characters(each) for key, each in value.items())
    if isinstance(value, Sequence):
        return sum(map(_characters, value))
    return 1


@contextmanager
def one_row() -> Iterator[None]:
    """Limit all renderings inside to RENDER_SECONDS together."""
    _left.append(RENDER_SECONDS)
    try:
        yield
    finally:
        _left.pop()


@contextmanager
def rendering() -> Iterator[None]:
    """Limit the time of one rendering, or use the rest of `one_row`'s time.

    Only the main thread of a process can be interrupted; other threads have no limit.

    Raises:
        TooSlow: the rendering took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    limit = _left[-1] if _left else RENDER_SECONDS
    before = signal.signal(signal.SIGVTALRM, _stop)
    begin = time.process_time()
    signal.setitimer(signal.ITIMER_VIRTUAL, max(limit, 0.001))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
        if _left:
            _left[-1] = limit - (time.process_time() - begin)


def _stop(number: int, frame: FrameType | None) -> None:
    raise TooSlow(f"the template took more than {RENDER_SECONDS:g} s of one row")


def bounded(pieces: Iterator[str]) -> Iterator[str]:
    """Yield the output of a template, up to MOST_RENDERED characters.

    Raises:
        ValueError: the template writes more.
    """
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > MOST_RENDERED:
            raise ValueError(f"the template writes more than {MOST_RENDERED:,} characters")
        yield piece
