"""Untrusted text made safe for a Markdown file, so that it appears exactly as written.

In running text and tables it is escaped with entities and backslashes. Texts of several lines and
commands go inside a fence that is longer than any fence in them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from torchprime.text.visible import clean

# An underscore between letters and a > inside a line have no meaning, and names often have them.
SPECIAL = re.compile(r"(^>|[\\`*\[\]|#~]|(?<!\w)_|_(?!\w))")
RULE = "---"


def inline(text: str) -> str:
    """Escape a text inside a line or a cell."""
    shown = " ".join(clean(text).split())
    shown = shown.replace("&", "&amp;").replace("<", "&lt;")
    return SPECIAL.sub(r"\\\1", shown)


def block(text: str, language: str = "text") -> list[str]:
    """Put the lines of a text unchanged in a fence."""
    shown = clean(text)
    longest = max(map(len, re.findall(r"`+", shown)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *shown.split("\n"), fence]


def code(text: str) -> str:
    """Format a text as code inside a line."""
    shown = " ".join(clean(text).split())
    longest = max(map(len, re.findall(r"`+", shown)), default=0)
    mark = "`" * (longest + 1)
    room = " " if shown.startswith("`") or shown.endswith("`") else ""
    return f"{mark}{room}{shown}{room}{mark}"


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table."""
    lines = [headings, [RULE] * len(headings), *rows]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]


def _cell(text: str) -> str:
    return text if text == RULE else inline(text)
