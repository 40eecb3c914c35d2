"""Tables of the types that the fields of a JSON file must have, and the check against them.

A checkpoint's file may come from an untrusted source. Its reader checks it against these tables
first, so that no number turns out to be text later, and no list has a million entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

from torchprime.text.visible import clean

MOST_TEXT = 1 << 20  # characters of one field; a random generator's state has 20,000
MOST_ENTRIES = 1 << 20
MOST_COUNT = 1 << 53
SHOWN = 60


@dataclass(frozen=True)
class Kind:
    """The type that a value must have, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


Table = Mapping[str, Union[Kind, "Table"]]


def count(least: int = 0) -> Kind:
    return Kind(
        f"a whole number from {least}",
        lambda v: type(v) is int and least <= v <= MOST_COUNT,
    )


def or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.expected}, or null", lambda v: v is None or kind.holds(v))


def texts_to(kind: Kind) -> Kind:
    return Kind(
        f"an object whose values are each {kind.expected}",
        lambda v: (
            _is_sized(v, dict) and all(map(TEXT.holds, v)) and all(map(kind.holds, v.values()))
        ),
    )


def list_of(kind: Kind, expected: str) -> Kind:
    return Kind(expected, lambda v: _is_sized(v, list) and all(map(kind.holds, v)))


def _is_sized(value: Any, type_: type) -> bool:
    return isinstance(value, type_) and len(value) <= MOST_ENTRIES


TEXT = Kind("text", lambda v: isinstance(v, str) and len(v) <= MOST_TEXT)
NUMBER = Kind("a number", lambda v: type(v) in (int, float))
OBJECT = Kind("an object", lambda v: _is_sized(v, dict))
SHA256 = Kind(
    "64 hexadecimal digits",
    lambda v: isinstance(v, str) and re.fullmatch("[0-9a-f]{64}", v) is not None,
)


def check_fields(content: Any, table: Table, where: str = "") -> None:
    """Compare an object with a table; fields that are not in the table are ignored.

    Args:
        where: the field that holds the object.

    Raises:
        ValueError: naming the first field that is missing or has another type.
    """
    if not isinstance(content, dict):
        raise ValueError(told(where, content, "an object"))
    for name, kind in table.items():
        field = f"{where}.{name}" if where else name
        if name not in content:
            raise ValueError(f"{where} lacks {name}" if where else f"it lacks {name}")
        value = content[name]
        if not isinstance(kind, Kind):
            check_fields(value, kind, field)
        elif not kind.holds(value):
            raise ValueError(told(field, value, kind.expected))


def told(field: str, value: object, expected: str) -> str:
    """Describe an invalid field, with its value cut to a few characters."""
    text = repr(value) if isinstance(value, str | int | float | None) else type(value).__name__
    text = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
    return clean(f"{field}: given {text}, expected {expected}").replace("\n", "\\n")
