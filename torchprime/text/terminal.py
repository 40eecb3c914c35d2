"""Output to a person's terminal: messages to stderr, results to stdout.

A line may quote a row, a template, a file name or a model's answer, all of them untrusted. So
`shown` filters every printed text: a control character could clear the screen or write a false
line, and a mark of direction can reverse a name. A contract test allows no other print.

Imports are light: experimental/vllm_tpu_deployment uses it in an environment without torch_xla.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Literal, TextIO

from torchprime.errors import INTERRUPTED, StoppedError, UserError, told_disk_fault
from torchprime.text.visible import clean

Errors = Literal["replace", "backslashreplace"]
# Without these two some scripts are misspelt and some emoji fall apart; they are harmless.
JOINERS = re.compile("([\u200c\u200d])")
COLOUR = re.compile("(\x1b\\[[0-9;]*m)")


def shown(text: str) -> str:
    """Return the text with control characters and marks of direction escaped, tabs as spaces."""
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n").replace("\t", "    ")
    return "".join(p if JOINERS.fullmatch(p) else clean(p) for p in JOINERS.split(text))


def is_first_process() -> bool:
    """Return True on the process that talks to the user. torchrun gives the rank before a backend
    does."""
    return os.environ.get("RANK", "0") == "0"


def only_first(say: Callable[[str], None], first: bool | None = None) -> Callable[[str], None]:
    """Return `say` on the first process, and a function that prints nothing on the others.

    Args:
        first: True on the first process; None to ask `is_first_process`.
    """
    return say if (is_first_process() if first is None else first) else _silent


def _silent(text: str) -> None:
    """Print nothing: another process does."""


def say(text: str, stream: TextIO | None = None) -> None:
    """Print a message with one write and flush it.

    Args:
        stream: stderr if not given.
    """
    there: TextIO = stream or sys.stderr
    try:
        there.write(f"{_encodable(shown(text), there, 'backslashreplace')}\n")
        there.flush()
    except BrokenPipeError:
        _forget(there)


def tick(text: str) -> None:
    """Print a line that the next one overwrites, on a terminal only."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\x1b[K{shown(text)}")
        sys.stderr.flush()


def print_lines(
    lines: Iterable[str], errors: Errors = "backslashreplace", coloured: bool = False
) -> None:
    """Print to stdout, even if its encoding is not Unicode or it is closed early (`| head`).

    Args:
        errors: replacement for a character that stdout's encoding lacks: `?`, or its escape.
        coloured: keep escape codes of colours; the caller has cleaned the text between them.
    """
    print_text("\n".join(lines) + "\n", errors, coloured)


def print_text(text: str, errors: Errors, coloured: bool = False) -> None:
    """Print as `print_lines` does a text that need not end with a line break, and flush it."""
    parts = COLOUR.split(text) if coloured else [text]
    safe = "".join(p if place % 2 else shown(p) for place, p in enumerate(parts))
    try:
        sys.stdout.write(_encodable(safe, sys.stdout, errors))
        sys.stdout.flush()
    except BrokenPipeError:
        _forget(sys.stdout)


def print_json(value: object) -> None:
    """Print one line of JSON; characters that `shown` would escape get JSON escapes."""
    text = json.dumps(value, ensure_ascii=False)
    print_lines(["".join(c if shown(c) == c else json.dumps(c)[1:-1] for c in text)])


def _encodable(text: str, stream: TextIO, errors: Errors) -> str:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, errors).decode(encoding)


def _forget(stream: TextIO) -> None:
    """Discard buffered output, which would raise an error at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def reported(command: Callable[[], int]) -> int:
    """Run a command; report a stop, a user error or a disk fault in one line.

    Returns:
        The command's exit code, or the one of what ended it.
    """
    guard_output()
    try:
        return command()
    except StoppedError as stop:
        say(f"stopped: {stop}")
        return stop.exit_code
    except UserError as error:
        say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        if (told := told_disk_fault(error)) is None:
            raise
        say(f"error: {told}")
        return UserError.exit_code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED


# Output of libraries and of Python itself ---------------------------------------------------------


class _Record(logging.LogRecord):
    def getMessage(self) -> str:
        return shown(super().getMessage())


_formatwarning = warnings.formatwarning


def _warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    return shown(_formatwarning(message, category, filename, lineno, line))


def _uncaught(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    say("".join(traceback.format_exception(kind, error, where)).rstrip("\n"))


def guard_output() -> None:
    """Make logging, warnings and tracebacks print through `shown`, for a process's entry point."""
    logging.setLogRecordFactory(_Record)
    warnings.formatwarning = _warning
    sys.excepthook = _uncaught
