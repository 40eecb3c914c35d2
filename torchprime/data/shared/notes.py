"""Facts about rows that a person should know although the rows are used: counts with an example.

Law 9 says that nothing is lost silently. A rejected row is counted elsewhere; what is counted here
is smaller: a key that no rule reads, a null that Arrow's storage filled in, a system turn that the
chat template drops.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torchprime.data.shared.fields import printable, type_name

EXAMPLE_CHARACTERS, KEY_CHARACTERS = 60, 120
MOST_KEYS, OTHERS = 1000, "other keys"  # objects whose keys are data have no end of them


@dataclass
class Noted:
    """How often something was noticed, the first row it was noticed in, and an example."""

    count: int
    row_id: str
    example: str = ""


class RowNotes:
    """Counts of what was noticed in rows, in two groups.

    Attributes:
        unused: keys of rows and of messages that nothing reads, by path: `context`,
            `messages.lang`. Only keys with a value other than null are counted.
        noticed: everything else, by its text: "null filled in by the file's schema, removed".
    """

    def __init__(self) -> None:
        self.unused: dict[str, Noted] = {}
        self.noticed: dict[str, Noted] = {}

    def unused_key(self, path: str, value: Any, row_id: str) -> None:
        """Count a key that is not used; the first value is kept as the example."""
        _count(self.unused, path, 1, row_id, value)

    def notice(self, text: str, row_id: str, count: int = 1, example: Any = "") -> None:
        """Count something else; `text` is the same for all rows it happened to."""
        _count(self.noticed, text, count, row_id, example)

    def add(self, other: RowNotes) -> None:
        """Add the counts of another, which came later."""
        for mine, theirs in ((self.unused, other.unused), (self.noticed, other.noticed)):
            for key, noted in theirs.items():
                found = mine.setdefault(key, Noted(0, noted.row_id, noted.example))
                found.count += noted.count

    def to_dict(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Plain containers, for data_report.json."""
        return {
            "unused_keys": {key: asdict(noted) for key, noted in self.unused.items()},
            "noticed": {text: asdict(noted) for text, noted in self.noticed.items()},
        }


class RowFindings:
    """Findings from the reading of one row; added to the notes if the row is used.

    Attributes:
        unused: (path, value) of each key that nothing reads.
        noticed: (text, count) of everything else.
        tools: schemas that stand in the row's messages.
    """

    __slots__ = ("noticed", "tools", "unused")

    def __init__(self) -> None:
        self.unused: list[tuple[str, Any]] = []
        self.noticed: list[tuple[str, int]] = []
        self.tools: list[Any] = []

    def add_to(self, notes: RowNotes, row_id: str) -> None:
        """Count what was found in a row that is used."""
        for path, value in self.unused:
            notes.unused_key(path, value, row_id)
        for text, count in self.noticed:
            notes.notice(text, row_id, count)


def describe_noted(noted: Mapping[str, Mapping[str, Any]]) -> str:
    """The counts in one line, the most frequent first."""
    ordered = most_first(noted)
    return "; ".join(f"{key}: {each['count']:,}{noted_first(each)}" for key, each in ordered)


def most_first(noted: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Mapping[str, Any]]]:
    """Return what was noted with its counts, the most frequent first."""
    return sorted(noted.items(), key=lambda item: -item[1]["count"])


def noted_first(noted: Mapping[str, Any]) -> str:
    """The first row something was noted in, and an example, in brackets."""
    example = f", e.g. {noted['example']}" if noted["example"] else ""
    return f" (first {noted['row_id']}{example})"


def _count(into: dict[str, Noted], key: str, count: int, row_id: str, example: Any) -> None:
    found = into.get(key)
    if found is None:
        key = printable(key, KEY_CHARACTERS) if len(into) < MOST_KEYS else OTHERS
        found = into.setdefault(key, Noted(0, row_id, example_of(example)))
    found.count += count


def example_of(value: Any) -> str:
    """A value as a short text for a person."""
    if isinstance(value, str):
        return printable(repr(value) if value else "", EXAMPLE_CHARACTERS)
    if isinstance(value, int | float):
        return str(value)
    return type_name(value)
