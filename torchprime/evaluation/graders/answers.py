"""Graders of final answers: the text after `####` or inside `<answer>`, compared as a quantity.

    "...\n#### **$1,234.50** in all."  ->  final_answer  ->  Quantity(Fraction(2469, 2), "$ in all")

quantities.py defines a quantity. A text that is none is compared as a text, or is no answer.
"""

from __future__ import annotations

import regex

from torchprime.evaluation.graders.quantities import Quantity, quantity
from torchprime.evaluation.graders.samples import Grader, Sample

# GSM8K --------------------------------------------------------------------------------------------

MARKER = regex.compile(r"(?<!\#)\#{4}(?!\#)[^\S\n]*([^\n]*)")
PLAIN_NUMBER = regex.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def final_answer(text: str) -> Quantity | None:
    """Return the quantity after the last `####`, to the end of its line."""
    lines = MARKER.findall(text)
    return quantity(lines[-1]) if lines else None


def agree(one: Quantity | str | None, other: Quantity | str | None) -> bool:
    """Return True if two values are the same: quantities by value, texts by equality."""
    if isinstance(one, Quantity) and isinstance(other, Quantity):
        return one.agrees(other)
    return one is not None and one == other


def gsm8k_answer(key: str) -> Grader:
    """Build a grader: 1 if output and reference end in the same number after `####`.

    It gives None if the reference has none. If both name a unit after it, the units must be the
    same.
    """

    def grade(sample: Sample) -> float | None:
        wanted = final_answer(sample.reference)
        return None if wanted is None else float(agree(final_answer(sample.output), wanted))

    return grade


def gsm8k_format(key: str) -> Grader:
    """Build a grader: 1 if the answer ended by itself and its last line, and no other, is `#### n`.

    n is a plain number as in GSM8K: digits, optionally a minus, commas or decimals. An answer that
    was cut off by the token limit may lack digits or further text.
    """

    def grade(sample: Sample) -> float:
        last = sample.output.rstrip().rpartition("\n")[2]
        form = last.startswith("#### ") and PLAIN_NUMBER.fullmatch(last.removeprefix("#### "))
        return float(bool(form) and sample.stopped and sample.output.count("####") == 1)

    return grade


# <think> and <answer> -----------------------------------------------------------------------------

TAGS = ("<think>", "</think>", "<answer>", "</answer>")
THINK_ANSWER = regex.compile(
    r"\s*<think>.*</think>\s*<answer>(?=.*\S.*</answer>).*</answer>\s*", regex.DOTALL
)
ANSWER = regex.compile(r"<answer>(.*?)</answer>", regex.DOTALL)


def think_answer(key: str) -> Grader:
    """Build a grader: 1 if the output is one <think> block, then one <answer> block, and no more.

    Only white space may stand around the blocks. The answer is not blank; the thoughts may be.
    """

    def grade(sample: Sample) -> float:
        once = all(sample.output.count(tag) == 1 for tag in TAGS)
        return float(once and sample.stopped and bool(THINK_ANSWER.fullmatch(sample.output)))

    return grade


def think_answer_value(key: str) -> Grader:
    """Build a grader: 1 if the output's one <answer> block has the same value as the reference's.

    Two quantities are compared by value, other values as texts with single spaces. A reference
    without the block gives its quantity after `####`; None if it has neither.
    """

    def grade(sample: Sample) -> float | None:
        wanted = _answer_value(sample.reference)
        wanted = final_answer(sample.reference) if wanted is None else wanted
        return None if wanted is None else float(agree(_answer_value(sample.output), wanted))

    return grade


def _answer_value(text: str) -> Quantity | str | None:
    """Return the value in the only <answer> block: a quantity if it is one, else its text."""
    values = ANSWER.findall(text)
    if len(values) != 1 or not values[0].strip():
        return None
    return quantity(values[0]) or " ".join(values[0].split())
