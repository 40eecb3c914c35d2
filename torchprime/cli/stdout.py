"""Printing to whatever stdout is: a terminal, a file, a pipe that someone closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Literal

Errors = Literal["replace", "backslashreplace"]


def print_lines(lines: Iterable[str], errors: Errors) -> None:
    """To stdout, also where that knows less than Unicode or is closed early (`| head`).

    Args:
        errors: what becomes of a character that stdout's encoding lacks: `?`, or its escape.
    """
    print_text("\n".join(lines) + "\n", errors)


def print_text(text: str, errors: Errors) -> None:
    """As `print_lines`, of a text that need not end with its line; it is seen at once."""
    encoding = sys.stdout.encoding or "utf-8"
    try:
        sys.stdout.write(text.encode(encoding, errors).decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would be an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
