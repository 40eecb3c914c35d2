"""Text that anyone may have written, made part of a Markdown file: as it is, and nothing more.

In running text and tables it is escaped by entities and backslashes; texts of several lines and
commands go inside a fence that is longer than any in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchprime.visible import clean

# An underscore between letters and a > behind something mean nothing, and names are full of them.
SPECIAL = re.compile(r"(^>|[\\`*\[\]|#~]|(?<!\w)_|_(?!\w))")
RULE = "---"


def inline(text: str) -> str:
    """A text inside a line or a cell."""
    shown = " ".join(clean(text).split())
    shown = shown.replace("&", "&amp;").replace("<", "&lt;")
    return SPECIAL.sub(r"\\\1", shown)


def block(text: str, language: str = "text") -> list[str]:
    """The lines of a text, word by word, in a fence."""
    shown = clean(text)
    longest = max(map(len, re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *shown.split("\n"), fence]


def code(text: str) -> str:
    """A text as code inside a line."""
    shown = " ".join(clean(text).split())
    longest = max(map(len, re.findall(r"`+", shown)), default=0)
    mark = "`" * (longest + 1)
    room = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{mark}{room}{shown}{room}{mark}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table."""
    lines = [headings, [RULE] * len(headings), *rows]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]


def _cell(text: str) -> str:
    return text if text == RULE else inline(text)
