"""The table of kinds: options are checked against it, and every grader it makes can grade."""

from __future__ import annotations

from typing import Any

import pytest

from torchprime.errors import ConfigError
from torchprime.evaluation.graders.make import KINDS, Sample, make_grader, options_of

KEY = "eval.graders[2]"
# Keys that a kind requires.
NEEDED: dict[str, dict[str, Any]] = {
    "regex": {"pattern": "a"},
    "json_schema": {"schema": {"type": "object"}},
    "python": {"path": "builtins:bool"},
}
SAMPLE = Sample("rows.jsonl:1", "question", "output", "reference", stopped=True, tokens=2)


def refusal_of(kind: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as error:
        make_grader(kind, key=KEY, **options)
    return str(error.value)


def _skip_without_its_library(kind: str) -> None:
    if kind == "math":
        pytest.importorskip("math_verify", reason="pip install 'torchprime[math]'")


def test_the_kinds_are_those_that_were_promised() -> None:
    assert {kind: list(options_of(kind)) for kind in KINDS} == {
        "exact_match": ["strip", "ignore_case"],
        "contains": ["text", "ignore_case"],
        "regex": ["pattern", "on"],
        "gsm8k_answer": [],
        "gsm8k_format": [],
        "think_answer": [],
        "think_answer_value": [],
        "math": [],
        "json": ["fenced"],
        "json_schema": ["schema", "fenced"],
        "non_empty": [],
        "length": ["unit"],
        "repetition": ["n"],
        "refusal": ["phrases"],
        "stopped": [],
        "python": ["path"],
    }


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_grades_with_its_defaults(kind: str) -> None:
    _skip_without_its_library(kind)
    grade = make_grader(kind, key=KEY, **NEEDED.get(kind, {}))(SAMPLE)
    assert grade is None or isinstance(grade, float)


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_may_be_written_out(kind: str) -> None:
    _skip_without_its_library(kind)
    written = {
        name: parameter.default
        for name, parameter in options_of(kind).items()
        if name not in NEEDED.get(kind, {})
    }
    grader = make_grader(kind, key=KEY, **written, **NEEDED.get(kind, {}))
    assert grader(SAMPLE) == make_grader(kind, **NEEDED.get(kind, {}))(SAMPLE)


def test_a_kind_that_is_none_names_the_likely_one_and_all() -> None:
    message = refusal_of("gsm8k_anser")
    assert message.startswith(f"{KEY}.kind: given 'gsm8k_anser', expected one of ")
    assert f"Did you mean {KEY}.kind=gsm8k_answer?" in message
    assert all(kind in message for kind in KINDS)


def test_a_kind_that_is_no_text() -> None:
    assert refusal_of(3).startswith(f"{KEY}.kind: given 3, expected one of ")  # type: ignore[arg-type]


def test_an_unknown_option_names_the_likely_one_and_all() -> None:
    assert refusal_of("regex", pattern="a", patern="b") == (
        f"{KEY}.patern: given 'b', but kind regex has no such option. "
        "Did you mean pattern? Its options: pattern, on."
    )


def test_an_option_of_a_kind_without_any() -> None:
    assert refusal_of("stopped", n=1) == (
        f"{KEY}.n: given 1, but kind stopped has no such option. Take n out: it has none."
    )


@pytest.mark.parametrize("kind", NEEDED)
def test_a_missing_option(kind: str) -> None:
    (option,) = NEEDED[kind]
    assert refusal_of(kind) == (
        f"{KEY}.{option}: given nothing, expected a value, since graders of kind {kind} need one. "
        f"Add {option}: ... below kind: {kind}."
    )


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("exact_match", {"strip": "yes"}, ("strip: given 'yes'", "true or false", "strip=true")),
        ("contains", {"text": 5}, ("text: given 5", "text, not a whole number", "in quotes")),
        ("regex", {"pattern": "a", "on": "outpt"}, ("on: given 'outpt'", "one of", "on=output")),
        ("length", {"unit": "token"}, ("unit: given 'token'", "one of tokens", "unit=tokens")),
        ("repetition", {"n": 2.5}, ("n: given 2.5", "a whole number", "n=100")),
        ("refusal", {"phrases": "no"}, ("phrases: given 'no'", "a list", "phrases=[no]")),
        ("json", {"fenced": 1}, ("fenced: given 1", "true or false", "fenced=true")),
    ],
)
def test_a_value_of_the_wrong_type(
    kind: str, options: dict[str, Any], expected: tuple[str, ...]
) -> None:
    message = refusal_of(kind, **options)
    assert message.startswith(f"{KEY}.{expected[0]}")
    assert all(part in message for part in expected)
