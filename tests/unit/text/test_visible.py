"""Foreign characters made visible: nothing that moves the cursor or turns text round is left."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprime.text.visible import ESCAPE, NEWLINE, SPACE, TEXT, clean, visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain é 東京 🙂", "plain é 東京 🙂"),
        ("a\x1b[31mb", "a\\x1b[31mb"),
        ("a\tb\rc", "a\\tb\\rc"),
        ("\u202eevil", "\\u202eevil"),
        ("a\u200bb\ufeff", "a\\u200bb\\ufeff"),
        ("a\xa0b", "a\\u00a0b"),
        ("\udcff", "\\xff"),
        ("\ud800", "\\ud800"),
        ("\U000e0041", "\\U000e0041"),
    ],
)
def test_characters_without_a_shape_are_escaped(text: str, shown: str) -> None:
    assert clean(text) == shown


def test_runs_keep_their_order_and_kind() -> None:
    assert visible("ab  \n\x00\x01c") == [
        (TEXT, "ab"),
        (SPACE, "  "),
        (NEWLINE, "\n"),
        (ESCAPE, "\\x00\\x01"),
        (TEXT, "c"),
    ]
    assert visible("") == []


@given(st.text())
def test_any_text_is_safe_and_encodable(text: str) -> None:
    shown = clean(text)
    assert shown.encode("utf-8").decode("utf-8") == shown
    assert all(c in " \n" or unicodedata.category(c)[0] not in "CZ" for c in shown)
    assert clean(shown) == shown
