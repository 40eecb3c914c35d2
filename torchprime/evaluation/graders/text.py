"""Graders of an answer as text: its content, its length, its end.

Each builder takes the key of its section, for messages, and its options (see make.py).
"""

from __future__ import annotations

from typing import Literal

import regex

from torchprime.config.checks import refuse
from torchprime.errors import DataError
from torchprime.evaluation.graders.samples import Grader, Sample

# A pattern takes microseconds; one with endless backtracking would block the run for ever.
PATTERN_SECONDS = 5.0


def exact_match(key: str, strip: bool = True, ignore_case: bool = False) -> Grader:
    """Build a grader: 1 if the output is the reference; None if the reference is blank."""

    def grade(sample: Sample) -> float | None:
        if not sample.reference.strip():
            return None
        output, reference = sample.output, sample.reference
        if strip:
            output, reference = output.strip(), reference.strip()
        if ignore_case:
            output, reference = output.casefold(), reference.casefold()
        return float(output == reference)

    return grade


def contains(key: str, text: str | None = None, ignore_case: bool = False) -> Grader:
    """Build a grader: 1 if the output contains the text, or else the stripped reference.

    It gives None if the reference is searched for and is blank: everything contains that.
    """
    if text is not None and not text.strip():
        refuse(
            f"{key}.text",
            text,
            "a text that an output may lack, or null for the reference",
            "Write the text to look for.",
        )

    def grade(sample: Sample) -> float | None:
        wanted = sample.reference.strip() if text is None else text
        if not wanted:
            return None
        if ignore_case:
            return float(wanted.casefold() in sample.output.casefold())
        return float(wanted in sample.output)

    return grade


def regex_grader(
    key: str, pattern: str, on: Literal["output", "reference", "prompt"] = "output"
) -> Grader:
    """Build a grader: 1 if the pattern is found in the output; `^`, `$` and `(?i)` work as usual.

    Raises:
        DataError: (when grading) the pattern backtracks for seconds.
    """
    compiled = compile_pattern(pattern, f"{key}.pattern")

    def grade(sample: Sample) -> float:
        text: str = getattr(sample, on)
        try:
            return float(compiled.search(text, timeout=PATTERN_SECONDS) is not None)
        except TimeoutError:
            raise DataError(
                f"{key}.pattern: {pattern!r} took more than {PATTERN_SECONDS:g} s on the {on} of "
                f"row {sample.row_id} ({len(text)} characters), expected a pattern that does not "
                f"backtrack without an end. Let its alternatives begin differently, or make its "
                f"repeats possessive: a++ for a+."
            ) from None

    return grade


def compile_pattern(pattern: str, key: str) -> regex.Pattern[str]:
    """Return a pattern of the `regex` library, whose matching can have a time limit. Raise a
    ConfigError if it is malformed."""
    try:
        return regex.compile(pattern)
    except regex.error as error:
        refuse(
            key,
            pattern,
            f"a regular expression, but: {error}",
            "Correct it there; put a backslash before a special character that is meant literally.",
        )


def non_empty(key: str) -> Grader:
    """Build a grader: 1 if the output has anything but white space."""
    return lambda sample: float(bool(sample.output.strip()))


def stopped(key: str) -> Grader:
    """Build a grader: 1 if the answer ended with a stop token, 0 if the limit cut it off."""
    return lambda sample: float(sample.stopped)


def length(key: str, unit: Literal["tokens", "words", "chars"] = "tokens") -> Grader:
    """Build a grader: the length of the output."""
    if unit == "tokens":
        return lambda sample: float(sample.tokens)
    if unit == "words":
        return lambda sample: float(len(sample.output.split()))
    return lambda sample: float(len(sample.output))


def repetition(key: str, n: int = 4) -> Grader:
    """Build a grader: the share of n-grams of words that occurred before in the same output, from 0
    to under 1."""
    if n < 1:
        refuse(f"{key}.n", n, "at least 1", f"Set {key}.n=4.")

    def grade(sample: Sample) -> float:
        words = sample.output.split()
        runs = [tuple(words[start : start + n]) for start in range(len(words) - n + 1)]
        return 1 - len(set(runs)) / len(runs) if runs else 0.0

    return grade
