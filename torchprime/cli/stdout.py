"""Printing to whatever stdout is: a terminal, a file, a pipe that someone closed."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Literal


def print_lines(lines: Iterable[str], errors: Literal["replace", "backslashreplace"]) -> None:
    """To stdout, also where that knows less than Unicode or is closed early (`| head`).

    Args:
        errors: what becomes of a character that stdout's encoding lacks: `?`, or its escape.
    """
    encoding = sys.stdout.encoding or "utf-8"
    text = "\n".join(lines) + "\n"
    try:
        sys.stdout.write(text.encode(encoding, errors).decode(encoding))
        sys.stdout.flush()
    except BrokenPipeError:
        # What is left in the buffer would be an error at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
