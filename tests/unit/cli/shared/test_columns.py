"""Columns: nothing is lost, nothing is wider than its column, and no printed line changes later."""

from __future__ import annotations

import random
import re

import pytest

from torchprime.cli.shared.columns import answers_lines, cells, column_width, in_columns, wrap
from torchprime.text.terminal import shown

TEXTS = [
    "",
    "one",
    "a few words that are wrapped somewhere   with a gap",
    "line\n\n    indented code that is long enough to wrap\nend ",
    "averyveryverylongwordwithoutanyend and more",
    "東京は日本の首都であり、世界最大の都市の一つです。 ok",
    "e\u0301te\u0301 " * 9,
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("width", [2, 7, 20])
def test_wrapping_keeps_every_word_within_the_width(text: str, width: int) -> None:
    lines = wrap(text, width)
    assert all(cells(line) <= width for line in lines)
    assert re.sub(r"\s", "", "".join(lines)) == re.sub(r"\s", "", text)
    assert len(lines) > text.count("\n")


@pytest.mark.parametrize("text", TEXTS)
def test_only_the_last_line_changes_when_text_is_added(text: str) -> None:
    for width in (2, 7, 20):
        whole = wrap(text, width)
        for end in range(len(text)):
            if text[end : end + 1] != "\u0301":  # which belongs to the letter before it
                before = wrap(text[:end], width)[:-1]
                assert whole[: len(before)] == before


def test_words_are_not_cut_where_they_fit_on_a_line() -> None:
    assert wrap("aa bbb cc", 5) == ["aa", "bbb", "cc"]
    assert wrap("aa bbb cc", 6) == ["aa bbb", "cc"]
    assert wrap("    if x:\n\treturn", 20) == ["    if x:", "\treturn"]


def test_wide_characters_take_two_cells() -> None:
    assert [cells(text) for text in ("ab", "東京", "e\u0301", "a\u200db", "")] == [2, 4, 1, 2, 0]


def test_columns_stand_where_they_should() -> None:
    lines = in_columns(["東京 ab\nc", "x"], 8)
    assert lines == ["東京 ab  | x", "c        |"]


def test_control_characters_are_written_out() -> None:
    assert shown("a\x1b[2Jb\r\nc\td\u202e\ud800") == "a\\x1b[2Jb\nc    d\\u202e\\ud800"
    assert shown("نمی\u200cخواهم") == "نمی\u200cخواهم"


def test_answers_side_by_side_or_below_each_other() -> None:
    answers = [("base", "no"), ("model", "yes\nsir")]
    assert column_width(60, 2) is None and column_width(200, 1) is None
    assert answers_lines(answers, 60) == ["base:", "no", "model:", "yes", "sir"]
    wide = answers_lines(answers, 80)
    assert [re.split(r" +\| ?", line) for line in wide if "-" not in line] == [
        ["base", "model"],
        ["no", "yes"],
        ["", "sir"],
    ]
    assert max(map(cells, wide)) <= 80
    assert answers_lines(answers[1:], 80) == ["yes", "sir"]


def test_random_texts_are_wrapped_the_same_at_once_and_bit_by_bit() -> None:
    generator = random.Random(3)
    for _ in range(200):
        text = "".join(generator.choice("ab  \n東") for _ in range(40))
        printed: list[str] = []
        for end in range(len(text) + 1):
            ready = wrap(text[:end], 6)[:-1]
            printed += ready[len(printed) :]
        assert printed == wrap(text, 6)[: len(printed)]
