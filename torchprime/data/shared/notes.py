"""Notes about rows that are used although a person should check them: counts with an example.

Law 9 requires that nothing is lost silently. Rejected rows are counted elsewhere. The notes count
smaller things: an unread key, a null that Arrow's storage filled in, a system turn that the chat
template drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from torchprime.data.shared.fields import printable, type_name

EXAMPLE_CHARACTERS, KEY_CHARACTERS = 60, 120
MOST_KEYS, OTHERS = 1000, "other keys"  # objects with data as keys have unlimited keys


@dataclass
class Noted:
    """The count of one finding, the first row it was found in, and an example."""

    count: int
    row_id: str
    example: str = ""

    def to_dict(self) -> NotedFacts:
        return {"count": self.count, "row_id": self.row_id, "example": self.example}


class NotedFacts(TypedDict):
    """The fields of a Noted in data_report.json."""

    count: int
    row_id: str
    example: str


class NotesFacts(TypedDict):
    """The two groups of RowNotes in data_report.json."""

    unused_keys: dict[str, NotedFacts]
    noticed: dict[str, NotedFacts]


class RowNotes:
    """Counts of findings in rows, in two groups.

    Attributes:
        unused: unread keys of rows and of messages, by path: `context`, `messages.lang`. Only keys
            with a value other than null are counted.
        noticed: everything else, by its text: "null filled in by the file's schema, removed".
    """

    def __init__(self) -> None:
        self.unused: dict[str, Noted] = {}
        self.noticed: dict[str, Noted] = {}

    def unused_key(self, path: str, value: Any, row_id: str) -> None:
        """Count an unread key; the first value becomes the example."""
        _count(self.unused, path, 1, row_id, value)

    def notice(self, text: str, row_id: str, count: int = 1, example: Any = "") -> None:
        """Count another finding; `text` is the same for all rows that have it."""
        _count(self.noticed, text, count, row_id, example)

    def add(self, other: RowNotes) -> None:
        """Add the counts of later notes."""
        for mine, theirs in ((self.unused, other.unused), (self.noticed, other.noticed)):
            for key, noted in theirs.items():
                found = mine.setdefault(key, Noted(0, noted.row_id, noted.example))
                found.count += noted.count

    def to_dict(self) -> NotesFacts:
        """Return plain containers, for data_report.json."""
        return {
            "unused_keys": {key: noted.to_dict() for key, noted in self.unused.items()},
            "noticed": {text: noted.to_dict() for text, noted in self.noticed.items()},
        }


class RowFindings:
    """Findings from the reading of one row; added to the notes if the row is used.

    Attributes:
        unused: (path, value) of each unread key.
        noticed: (text, count) of everything else.
        tools: schemas found in the row's messages.
    """

    __slots__ = ("noticed", "tools", "unused")

    def __init__(self) -> None:
        self.unused: list[tuple[str, Any]] = []
        self.noticed: list[tuple[str, int]] = []
        self.tools: list[Any] = []

    def add_to(self, notes: RowNotes, row_id: str) -> None:
        """Count the findings of a row that is used."""
        for path, value in self.unused:
            notes.unused_key(path, value, row_id)
        for text, count in self.noticed:
            notes.notice(text, row_id, count)


def describe_noted(noted: Mapping[str, NotedFacts]) -> str:
    """Return the counts in one line, the most frequent first."""
    ordered = most_first(noted)
    return "; ".join(f"{key}: {each['count']:,}{noted_first(each)}" for key, each in ordered)


def most_first(noted: Mapping[str, NotedFacts]) -> list[tuple[str, NotedFacts]]:
    """Return the findings with their counts, the most frequent first."""
    return sorted(noted.items(), key=lambda item: -item[1]["count"])


def noted_first(noted: NotedFacts) -> str:
    """Return the first row of a finding, and an example, in brackets."""
    example = f", e.g. {noted['example']}" if noted["example"] else ""
    return f" (first {noted['row_id']}{example})"


def _count(into: dict[str, Noted], key: str, count: int, row_id: str, example: Any) -> None:
    found = into.get(key)
    if found is None:
        key = printable(key, KEY_CHARACTERS) if len(into) < MOST_KEYS else OTHERS
        found = into.setdefault(key, Noted(0, row_id, example_of(example)))
    found.count += count


def example_of(value: Any) -> str:
    """Return a value as a short text for a person."""
    if isinstance(value, str):
        return printable(repr(value) if value else "", EXAMPLE_CHARACTERS)
    if isinstance(value, int | float):
        return str(value)
    return type_name(value)
