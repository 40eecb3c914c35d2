"""Graders of text: matches, patterns with a time limit, lengths, repetition."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchprime.errors import DataError
from torchprime.evaluation.graders import text as text_grading
from torchprime.evaluation.graders.make import Sample, make_grader
from torchprime.evaluation.graders.refusals import PHRASES

Grade = Callable[..., float | None]
Make = Callable[..., Sample]
Refused = Callable[..., str]

# exact_match and contains -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "options", "expected"),
    [
        ("Paris", {}, 1.0),
        (" Paris\n", {}, 1.0),
        (" Paris\n", {"strip": False}, 0.0),
        ("Paris", {"strip": False}, 1.0),
        ("paris", {}, 0.0),
        ("PARIS", {"ignore_case": True}, 1.0),
        (" PARIS", {"ignore_case": True, "strip": False}, 0.0),
        ("Paris.", {}, 0.0),
        ("", {}, 0.0),
    ],
)
def test_exact_match(grade: Grade, output: str, options: dict[str, bool], expected: float) -> None:
    assert grade("exact_match", output, "Paris", **options) == expected


def test_exact_match_ignores_the_reference_s_space_and_case_too(grade: Grade) -> None:
    assert grade("exact_match", "Paris", "\nParis ") == 1.0
    assert grade("exact_match", "stra\u00dfe", "STRASSE", ignore_case=True) == 1.0


@pytest.mark.parametrize("kind", ["exact_match", "contains"])
@pytest.mark.parametrize("reference", ["", " \n"])
def test_a_blank_reference_is_not_counted(grade: Grade, kind: str, reference: str) -> None:
    assert grade(kind, "", reference) is None
    assert grade(kind, "some", reference) is None


@pytest.mark.parametrize(
    ("output", "options", "expected"),
    [
        ("It is Paris.", {}, 1.0),
        ("It is paris.", {}, 0.0),
        ("It is paris.", {"ignore_case": True}, 1.0),
        ("", {}, 0.0),
        ("It is Rome.", {"text": "Rome"}, 1.0),
        ("It is Paris.", {"text": "Rome"}, 0.0),
        ("It is ROME.", {"text": "rome", "ignore_case": True}, 1.0),
        ("a.b", {"text": "a b"}, 0.0),
        ("a+b", {"text": "a+b"}, 1.0),
    ],
)
def test_contains(grade: Grade, output: str, options: dict, expected: float) -> None:
    assert grade("contains", output, "Paris\n", **options) == expected


def test_a_text_to_contain_needs_no_reference(grade: Grade) -> None:
    assert grade("contains", "It is Rome.", "", text="Rome") == 1.0


def test_a_text_that_everything_contains_is_refused(refused: Refused) -> None:
    assert refused("contains", text="") == (
        "eval.graders[1].text: given '', expected a text that an output may lack, or null for the "
        "reference. Write the text to look for."
    )


# regex --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "output", "expected"),
    [
        ("Arr", "Well, Arr!", 1.0),
        ("^Arr", "Well, Arr!", 0.0),
        (r"\AArr.*matey\Z", "Arr, matey", 1.0),
        ("arr", "ARR", 0.0),
        ("(?i)arr", "ARR", 1.0),
        ("a.b", "a\nb", 0.0),
        ("(?s)a.b", "a\nb", 1.0),
        (r"\p{Lu}", "\u00c9", 1.0),
        ("^$", "", 1.0),
    ],
)
def test_regex(grade: Grade, pattern: str, output: str, expected: float) -> None:
    assert grade("regex", output, pattern=pattern) == expected


@pytest.mark.parametrize(("on", "expected"), [("output", 0.0), ("reference", 1.0), ("prompt", 0.0)])
def test_regex_on_another_text(grade: Grade, on: str, expected: float) -> None:
    assert grade("regex", "a", "b", pattern="b", on=on) == expected


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("a(b", "missing ) at position 3"),
        ("ab[c", "unterminated character set at position 4"),
        ("*a", "nothing to repeat at position 0"),
    ],
)
def test_a_pattern_that_is_none_says_where(refused: Refused, pattern: str, problem: str) -> None:
    message = refused("regex", pattern=pattern)
    assert message.startswith(
        f"eval.graders[1].pattern: given {pattern!r}, expected a regular expression, but: {problem}"
    )
    assert "Correct it there" in message and "backslash" in message


def test_a_pattern_without_an_end_is_stopped(sample: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_grading, "PATTERN_SECONDS", 0.05)
    grader = make_grader("regex", key="eval.graders[1]", pattern="^(a|aa)+$")
    assert grader(sample("aaa")) == 1.0
    with pytest.raises(DataError) as error:
        grader(sample("a" * 999 + "b"))
    message = str(error.value)
    assert message.startswith(
        "eval.graders[1].pattern: '^(a|aa)+$' took more than 0.05 s on the output of row "
        "rows.jsonl:7 (1000 characters), expected a pattern that does not backtrack"
    )
    assert "make its repeats possessive: a++ for a+" in message


# Lengths and ends ---------------------------------------------------------------------------------


def test_non_empty(grade: Grade) -> None:
    assert [grade("non_empty", text) for text in ("a", " a\n", "", " \n\t", "\u00a0")] == [
        1.0, 1.0, 0.0, 0.0, 0.0,
    ]  # fmt: skip


def test_stopped(sample: Make) -> None:
    grader = make_grader("stopped")
    assert grader(sample("a")) == 1.0
    assert grader(sample("a", stopped=False)) == 0.0


@pytest.mark.parametrize(("unit", "expected"), [("tokens", 9.0), ("words", 3.0), ("chars", 15.0)])
def test_length(sample: Make, unit: str, expected: float) -> None:
    grown = sample("two  and\nthr\u00e9e ", tokens=9)
    assert make_grader("length", unit=unit)(grown) == expected


def test_length_is_in_tokens_unless_told(sample: Make) -> None:
    assert make_grader("length")(sample("one two", tokens=5)) == 5.0


# repetition ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "n", "expected"),
    [
        ("", 4, 0.0),
        ("a b c", 4, 0.0),
        ("a b c d", 4, 0.0),
        ("a b c d e", 4, 0.0),
        ("a a a a a", 4, 0.5),  # two runs, the second occurred before
        ("a b a b a b", 2, 3 / 5),  # ab ba ab ba ab
        ("a b a b", 1, 0.5),
        ("a A a", 1, 1 / 3),
        ("the end . the\nend .", 3, 1 / 4),
    ],
)
def test_repetition(grade: Grade, output: str, n: int, expected: float) -> None:
    assert grade("repetition", output, n=n) == pytest.approx(expected, abs=1e-15)


@given(st.lists(st.sampled_from("abc"), max_size=30), st.integers(1, 5))
def test_repetition_counts_runs_that_occurred_before(words: list[str], n: int) -> None:
    """Counted from left to right, without a set."""
    runs = ["".join(words[i : i + n]) for i in range(max(0, len(words) - n + 1))]
    again = sum(run in runs[:place] for place, run in enumerate(runs))
    expected = again / len(runs) if runs else 0.0
    graded = make_grader("repetition", n=n)(Sample("r:1", "", " ".join(words), "", True, 1))
    assert graded == pytest.approx(expected, abs=1e-12)


def test_repetition_of_nothing_is_refused(refused: Refused) -> None:
    assert refused("repetition", n=0) == (
        "eval.graders[1].n: given 0, expected at least 1. Set eval.graders[1].n=4."
    )


# refusal ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "output",
    [
        "I can't help with that.",
        "I can\u2019t help with that.",
        "I can\u00b4t help with that.",
        "I'm sorry, but I CANNOT assist you.",
        "As an AI language\nmodel, I have no opinion.",
        "I\u2019m  unable to say.",
        "Sorry, but I can't.",
    ],
)
def test_a_refusal(grade: Grade, output: str) -> None:
    assert grade("refusal", output) == 1.0


@pytest.mark.parametrize(
    "output",
    [
        "",
        "Of course I can help with that.",
        "I can help you; I cannot wait.",
        "She sells 18 eggs.\n#### 18",
        "Mai cannot help you.",
        "i can't helpwith",
        "I refuse todo lists.",
    ],
)
def test_no_refusal(grade: Grade, output: str) -> None:
    assert grade("refusal", output) == 0.0


def test_phrases_of_one_s_own_replace_the_list(grade: Grade) -> None:
    assert grade("refusal", "Nay,   I WON\u2019T!", phrases=["i won't"]) == 1.0
    assert grade("refusal", "I can't help with that.", phrases=["I won't"]) == 0.0
    assert grade("refusal", "a.b", phrases=["a.b"]) == 1.0
    assert grade("refusal", "axb", phrases=["a.b"]) == 0.0


def test_phrases_that_match_everything_are_refused(refused: Refused) -> None:
    assert refused("refusal", phrases=["no", " "]) == (
        "eval.graders[1].phrases[1]: given ' ', expected a phrase. Take the empty one out."
    )
    assert refused("refusal", phrases=[]) == (
        "eval.graders[1].phrases: given [], expected phrases, or null for the shipped list. "
        "Name some."
    )


def test_every_shipped_phrase_refuses(grade: Grade) -> None:
    assert len(set(PHRASES)) == len(PHRASES) > 40
    assert all(grade("refusal", f"Well, {phrase.upper()}...") == 1.0 for phrase in PHRASES)
