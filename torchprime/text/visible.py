"""Untrusted text made safe to display on a terminal or a page."""

from __future__ import annotations

import unicodedata
from itertools import groupby

TEXT, SPACE, NEWLINE, ESCAPE = "text", "space", "newline", "escape"


def visible(text: str) -> list[tuple[str, str]]:
    """Return the text in runs of (TEXT | SPACE | NEWLINE | ESCAPE, characters).

    Characters that are invisible or change the display of their neighbours (control characters,
    marks of direction, a byte that is part of a character) are an ESCAPE, written as in a Python
    string.
    """
    kinds = ((_kind(character), character) for character in text)
    return [
        (kind, "".join(_escaped(c) if kind == ESCAPE else c for _, c in run))
        for kind, run in groupby(kinds, key=lambda pair: pair[0])
    ]


def clean(text: str) -> str:
    """Return the text with ESCAPE characters escaped: safe for a terminal, and encodable."""
    return "".join(run for _, run in visible(text))


def _kind(character: str) -> str:
    if character == " ":
        return SPACE
    if character == "\n":
        return NEWLINE
    category = unicodedata.category(character)
    # Other and separator categories: blanks that are neither a space nor the end of a line.
    return ESCAPE if category[0] in "CZ" else TEXT


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":  # a byte, as in Tokenizer.pieces
        return f"\\x{ord(character) - 0xDC00:02x}"
    if "\x80" <= character <= "\xff":  # not to be confused with a byte
        return f"\\u{ord(character):04x}"
    return character.encode("unicode_escape").decode("ascii")
