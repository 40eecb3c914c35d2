"""Answers of several models to one prompt, for a terminal: side by side if they fit.

Narrow terminals get the answers one below the other. Answers are model output and may contain
anything, so control characters are made visible first (`shown`). A text is wrapped so that every
line but the last stays the same when more text follows: a column can be printed line by line during
generation.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence

from torchprime.text.terminal import shown

NARROWEST = 38  # characters of the narrowest column that is still easy to read
GAP = " | "


def column_width(terminal: int, columns: int) -> int | None:
    """Return the characters for each column; None if so many columns do not fit side by side."""
    width = (terminal - len(GAP) * (columns - 1)) // columns
    return width if columns > 1 and width >= NARROWEST else None


def wrap(text: str, width: int) -> list[str]:
    """Return lines of at most `width` cells; line breaks stay, longer words are split."""
    return [line for paragraph in text.split("\n") for line in _wrap_paragraph(paragraph, width)]


def _wrap_paragraph(paragraph: str, width: int) -> Iterator[str]:
    line = ""
    for piece in re.findall(r" +|[^ ]+", paragraph):
        if cells(line + piece) <= width:
            line += piece
            continue
        if line.strip():
            yield line.rstrip()
            line = ""
        if piece.isspace():
            line = ""
            continue
        while cells(piece) > width:
            head = _head(piece, width)
            yield head
            piece = piece[len(head) :]
        line = piece
    yield line.rstrip()


def _head(word: str, width: int) -> str:
    """Return as much of a word as fits, at least one character."""
    length = 1
    while length < len(word) and cells(word[: length + 1]) <= width:
        length += 1
    return word[:length]


def cells(text: str) -> int:
    """Return the width on a terminal: East Asian characters take two cells, accents none."""
    if text.isascii():
        return len(text)
    return sum(_cells_of(character) for character in text)


def _cells_of(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def beside(row: Sequence[str], width: int) -> str:
    """Return one line of every column, side by side."""
    padded = [line + " " * (width - cells(line)) for line in row]
    return GAP.join(padded).rstrip()


def in_columns(texts: Sequence[str], width: int) -> list[str]:
    """Return whole texts side by side."""
    columns = [wrap(shown(text), width) for text in texts]
    height = max(map(len, columns))
    filled = [column + [""] * (height - len(column)) for column in columns]
    return [beside(row, width) for row in zip(*filled, strict=True)]


def answers_lines(answers: Sequence[tuple[str, str]], terminal: int) -> list[str]:
    """Return whole answers with their titles: side by side, or below each other if they do not fit.

    Args:
        answers: (title, text) of each model; a single one is shown without a title.
        terminal: its width in characters.
    """
    if len(answers) == 1:
        return shown(answers[0][1]).split("\n")
    width = column_width(terminal, len(answers))
    if width is None:
        return [line for title, text in answers for line in [f"{title}:", *shown(text).split("\n")]]
    titles = beside([title for title, _ in answers], width)
    rule = beside(["-" * width for _ in answers], width)
    return [titles, rule, *in_columns([text for _, text in answers], width)]
