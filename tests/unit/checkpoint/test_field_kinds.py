"""Fields of a foreign JSON file are checked by name before anything uses them."""

from __future__ import annotations

from typing import Any

import pytest

from torchprime.checkpoint.field_kinds import (
    NUMBER,
    OBJECT,
    SHA256,
    TEXT,
    Kind,
    Table,
    check_fields,
    count,
    list_of,
    or_null,
    texts_to,
    told,
)


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (TEXT, ["", "a"], [None, 1, b"a", "x" * (2**20 + 1)]),
        (NUMBER, [0, -1.5, float("inf")], [True, "1", None]),
        (OBJECT, [{}, {"a": 1}], [[], None, "{}"]),
        (SHA256, ["0123456789abcdef" * 4], ["0" * 63, "0" * 65, "G" * 64, "A" * 64, 0]),
        (count(), [0, 2**53], [-1, 2**53 + 1, 1.0, True, "1"]),
        (count(1), [1], [0]),
        (or_null(TEXT), [None, "a"], [1]),
        (texts_to(count()), [{}, {"a": 1}], [{"a": -1}, {1: 1}, [1]]),
        (list_of(TEXT, "names"), [[], ["a"]], [["a", 1], "ab", ("a",)]),
    ],
)
def test_a_kind_accepts_its_values_alone(kind: Kind, good: list[Any], bad: list[Any]) -> None:
    assert [value for value in good if not kind.holds(value)] == []
    assert [value for value in bad if kind.holds(value)] == []


TABLE: Table = {"a": TEXT, "b": {"c": count(1)}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"b": {"c": 1}}, "it lacks a"),
        ({"a": "x"}, "it lacks b"),
        ({"a": "x", "b": {}}, "b lacks c"),
        ({"a": 1, "b": {"c": 1}}, "a: given 1, expected text"),
        ({"a": "x", "b": {"c": 0}}, "b.c: given 0, expected a whole number from 1"),
        ({"a": "x", "b": []}, "b: given list, expected an object"),
        ([], ": given list, expected an object"),
    ],
)
def test_the_first_wrong_field_is_named(content: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        check_fields(content, TABLE)
    assert str(caught.value) == said


def test_fields_beyond_the_table_are_ignored() -> None:
    check_fields({"a": "x", "b": {"c": 1, "d": None}, "e": 5}, TABLE)


def test_a_value_is_shown_short_and_harmless() -> None:
    assert told("a", "x" * 100, "text") == f"a: given {repr('x' * 100)[:60]}..., expected text"
    assert told("a\n\x1b[31m", 1, "text").isprintable()
    assert told("a", {"secret": 1}, "text") == "a: given dict, expected text"
