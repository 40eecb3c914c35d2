"""Final answers: what comes behind `####` or inside `<answer>`, compared as numbers.

    "...\n#### **$1,234.50** in all."  ->  final_answer  ->  number  ->  Fraction(2469, 2)

Numbers are read into exact fractions by way of decimals, never into floats: 0.1 + 0.2 must not
differ from 0.3, nor 10**17 equal 10**17 + 1. What could mean two numbers ("1,5", "5k", "18 and a
half") is no number: a grade errs towards 0, which a person finds among the samples, and not towards
1, which nobody looks for.
"""

from __future__ import annotations

from decimal import Decimal
from fractions import Fraction

import regex

from torchprime.evaluation.samples import Grader, Sample

# Numbers ------------------------------------------------------------------------------------------

LONGEST_NUMBER = 200  # characters; what is longer is a model that got stuck on a digit

# Behind a number these multiply it; a list of units cannot have them.
SCALES = {
    "hundred": 10**2,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
# Words that make another number of the one before them, or may. Not among them: "second", "times".
NOT_UNITS = {
    "and", "or", "to", "plus", "minus", "over", "half", "halves", "third", "thirds", "quarter",
    "quarters", "fourth", "fourths", "fifth", "fifths", "sixth", "sixths", "eighth", "eighths",
    "tenth", "tenths", "dozen", "dozens", "zero", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen",
    "sixteen", "seventeen", "eighteen", "nineteen", "twenty", "thirty", "forty", "fifty", "sixty",
    "seventy", "eighty", "ninety", "point", "k", "b", "bn", "mn", "mil",
}  # fmt: skip
MARKS = r"[*_`]*"  # Markdown
CURRENCY = r"\\?\p{Sc}"
GROUP_SPACE = "[ \u00a0\u2009\u202f]"
NUMBER = regex.compile(
    rf"""
    {MARKS} \s*
    (?P<sign>[-+\u2212])? \s* (?P<currency>{CURRENCY})? \s* (?P<inner_sign>[-+\u2212])? \s*
    (?:
        (?: (?P<whole>[0-9]+) [ ]+ (?=[1-9]) )?  (?P<over>[0-9]+) \s? / \s? (?P<under>[0-9]+)
      |
        (?P<digits>
            (?: [0-9]{{1,3}} (?:,[0-9]{{2,3}})* ,[0-9]{{3}}  # 1,234,567, and 12,34,567 of India
              | [0-9]{{1,3}} (?:{GROUP_SPACE}[0-9]{{3}})+
              | [0-9]+
            ) (?:\.[0-9]+)?
          | \.[0-9]+
        )
    )
    (?P<rest> {MARKS} [\p{{L}}\p{{M}}\p{{Sc}}\s\\%\u2030\u00b0\u00b2\u00b3'\u2019/()\-.,;:!*_`]* )
    """,
    regex.VERBOSE,
)


def number(text: str) -> Fraction | None:
    """The one number that a text is, exactly; None if it is none or could be several.

    Around the number may stand: a sign, a currency sign, commas or spaces between groups of three
    digits, Markdown's marks, a full stop, and a unit behind it in words without digits. "hundred"
    to "trillion" behind it multiply; "%" is a unit. "1/2" and "2 1/2" are fractions.
    """
    found = NUMBER.fullmatch(text.strip()[: LONGEST_NUMBER + 1])
    if found is None or len(text.strip()) > LONGEST_NUMBER:
        return None
    if found["sign"] and found["inner_sign"]:
        return None
    size, factor = _size(found), _factor(found["rest"], bool(found["currency"]))
    if size is None or factor is None:
        return None
    negative = (found["sign"] or found["inner_sign"] or "+") != "+"
    return -size * factor if negative else size * factor


def _size(found: regex.Match[str]) -> Fraction | None:
    if found["digits"] is not None:
        return Fraction(Decimal(regex.sub(rf",|{GROUP_SPACE}", "", found["digits"])))
    over, under = int(found["over"]), int(found["under"])
    if under == 0:
        return None
    if found["whole"] is None:
        return Fraction(over, under)
    # "2 5/3" is no mixed number, so who knows what it is.
    return int(found["whole"]) + Fraction(over, under) if over < under else None


def _factor(rest: str, currency: bool) -> int | None:
    """What the words behind a number multiply it by; None if they leave it open."""
    words = regex.findall(r"\p{L}+", rest.casefold())
    factor = 1
    while words and words[0] in SCALES:
        factor *= SCALES[words.pop(0)]
    if currency and words[:1] == ["m"]:  # five million or five metres
        return None
    if any(word in NOT_UNITS or word in SCALES for word in words):
        return None
    return factor


# GSM8K --------------------------------------------------------------------------------------------

MARKER = regex.compile(r"(?<!\#)\#{4}(?!\#)[^\S\n]*([^\n]*)")
PLAIN_NUMBER = regex.compile(r"-?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]+)?")


def final_answer(text: str) -> Fraction | None:
    """The number behind the last `####`, to the end of its line."""
    lines = MARKER.findall(text)
    return number(lines[-1]) if lines else None


def gsm8k_answer(key: str) -> Grader:
    """1 if output and reference end in the same number behind `####`; None without one there."""

    def grade(sample: Sample) -> float | None:
        wanted = final_answer(sample.reference)
        return None if wanted is None else float(final_answer(sample.output) == wanted)

    return grade


def gsm8k_format(key: str) -> Grader:
    """1 if the answer stopped by itself and its last line, and no other, is `#### n`.

    n is a plain number as in GSM8K: digits, maybe a minus, commas or decimals. An answer that the
    limit cut off may have lost digits, or what would have come behind.
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
    """1 if the output is one <think> block, then one <answer> block, and stopped there.

    Only white space may stand around the blocks. The answer is not blank; the thoughts may be.
    """

    def grade(sample: Sample) -> float:
        once = all(sample.output.count(tag) == 1 for tag in TAGS)
        return float(once and sample.stopped and bool(THINK_ANSWER.fullmatch(sample.output)))

    return grade


def think_answer_value(key: str) -> Grader:
    """1 if the one <answer> block of the output has the value of the reference's.

    Two numbers are compared as numbers, other values as texts with single spaces. A reference
    without the block gives its number behind `####`; None if it has neither.
    """

    def grade(sample: Sample) -> float | None:
        wanted = _answer_value(sample.reference)
        wanted = final_answer(sample.reference) if wanted is None else wanted
        return None if wanted is None else float(_answer_value(sample.output) == wanted)

    return grade


def _answer_value(text: str) -> Fraction | str | None:
    """The value in the only <answer> block: a number if it is one, else its text."""
    values = ANSWER.findall(text)
    if len(values) != 1 or not values[0].strip():
        return None
    value = number(values[0])
    return " ".join(values[0].split()) if value is None else value
