"""Final answers: one number written in many ways is one number, and no other is."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from torchprime.evaluation.graders.answers import final_answer
from torchprime.evaluation.graders.make import Sample, make_grader
from torchprime.evaluation.graders.quantities import Quantity, number
from torchprime.evaluation.intervals import score

Grade = Callable[..., float | None]
Make = Callable[..., Sample]

# Numbers, one by one ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", 18),
        ("  18 ", 18),
        ("18.", 18),
        ("+18", 18),
        ("-18", -18),
        ("\u221218", -18),
        ("- 18", -18),
        ("-0", 0),
        ("007", 7),
        ("1,000", 1000),
        ("1,234,567.50", Fraction(12345675, 10)),
        ("1,000.00", 1000),
        ("12,34,567", 1234567),
        ("1 000", 1000),
        ("1\u202f234\u202f567 km", 1234567),
        (".5", Fraction(1, 2)),
        ("0.1", Fraction(1, 10)),
        ("$18", 18),
        ("$ 18", 18),
        ("-$5", -5),
        ("$-5", -5),
        ("\\$18", 18),
        ("18$", 18),
        ("\u20ac18.50", Fraction(37, 2)),
        ("18 \u20ac", 18),
        ("18 dollars", 18),
        ("18 Euros per week.", 18),
        ("18 miles/hour", 18),
        ("18 km\u00b2", 18),
        ("18-year-olds", 18),
        ("18 (eggs)", 18),
        ("3 times", 3),
        ("20 seconds", 20),
        ("5%", 5),
        ("5 %", 5),
        ("5\\%", 5),
        ("**18**", 18),
        ("**18**.", 18),
        ("**$18** dollars", 18),
        ("`18`", 18),
        ("_18_", 18),
        ("1/2", Fraction(1, 2)),
        ("1 / 2", Fraction(1, 2)),
        ("-3/4 cups", Fraction(-3, 4)),
        ("10/4", Fraction(5, 2)),
        ("2 1/2", Fraction(5, 2)),
        ("-2 1/2 cups", Fraction(-5, 2)),
        ("5 million", 5_000_000),
        ("$1.5 million dollars", 1_500_000),
        ("5 hundred thousand", 500_000),
        ("-5 million", -5_000_000),
        ("5 lakh", 500_000),
        ("1.5 crore rupees", 15_000_000),
        ("5 lakh crore", 5 * 10**12),
        ("5kg", 5),
        ("5 kg per box", 5),
        ("45\u00b0", 45),
        ("20 \u00b0C", 20),
        ("5 per cent", 5),
        ("9" * 60, int("9" * 60)),
    ],
)
def test_a_number(text: str, value: int | Fraction) -> None:
    assert number(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "$", "-", "**", "eighteen", "x = 18", "about 18", "~18", "= 18", "<18>",
        "1,5", "1,50", "1,2,345", "1.000,00", "12,3456", "1,2345", "1,,000", "1.2.3", "1.000.000",
        "18 18", "1 0000", "1,234 5", "1_000", "1'000",
        "--5", "-$-5", "+-5",
        "2e3", "2E3", "1.5e-3", "10^3", "2**3", "2*3", "5x2", "12 m2",
        "1/0", "1/2/3", "12/25/2020", "2 5/3", "2-1/2", "1/-2", "\u00bd", "2\u00bd",
        "10-12", "10 - 3", "3:30", "18 = 18", "18 or 20", "18 or twenty", "18 to one",
        "18 and a half", "5 and 10 cents", "18 dollars and fifty cents", "5 point five",
        "two 5", "2 thirds", "3 quarters", "5 dozen", "5 dollars million",
        "5k", "5 k", "5K", "$5m", "$5 M", "5bn", "5B", "$5mm", "$18 euros",
        # letters, powers and scales that are not understood
        r"4\pi", "4\u03c0", "4 pi", "2x", "2 x", "2xy", "2\u00d7", "5i", "5 i", "3e", "5m",
        "5 m\u00b2", "7^2", "5 twentieths",
        "5\u00b2", "5 squared", "5!", "18 sq", r"18\\", "5'", "5th", "5abc", "5-x", "18 a", "18 of",
        "5 hundredths", "5 thousandths", "5 ten-thousandths", "5 millionths", "5 quadrillion",
        "5 grand", "5 score", "5 gross", "5 hundreds", "5 dozenth", "5 Tausend", "5 Millionen",
        "5\u4e07", "5 \u0442\u044b\u0441\u044f\u0447", "101 binary", "0.3 repeating",
        "0.333...", "18,", "5\u2030",
        "5 theta", "2 sin", "5 factorial", "5-fold", "5%%", "$5%",
        "18 (eggs", "18 eggs)", "18/", "18-",
        "\u0661\u0668", "18\u0661", "9" * 300, "nan", "inf", "Infinity", "0x12",
    ],
)  # fmt: skip
def test_no_number_or_not_one_only(text: str) -> None:
    assert number(text) is None


def test_a_number_that_a_float_would_not_hold() -> None:
    assert number("100000000000000001") != number("100000000000000000")
    assert number("0.30000000000000004") != number("0.3")
    assert number("1/3") != number("0.3333333333333333")


@settings(deadline=None)
@given(
    st.text(st.sampled_from("0123456789 ,.-+$%/*_`\\#me\u00a0\u2212\u00b2\u20ac\n"), max_size=60)
)
def test_any_text_is_read_without_an_error(text: str) -> None:
    value = number(text)
    assert value is None or isinstance(value, Fraction)


# Numbers, all ways of writing ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Written:
    value: Fraction
    text: str


@st.composite
def written(
    draw: st.DrawFn, values: st.SearchStrategy[Fraction] | None = None, unit: bool = True
) -> Written:
    """A number in one of the usual ways, put together from its digits."""
    value = draw(decimals() if values is None else values)
    places = 0
    while (value * 10**places).denominator != 1:
        places += 1
    digits = str(abs(value.numerator * 10**places // value.denominator)).zfill(places + 1)
    whole, behind = digits[: len(digits) - places], digits[len(digits) - places :]
    separator = draw(st.sampled_from(["", ",", " ", "\u00a0", "\u202f"]))
    head = len(whole) % 3
    groups = [whole[:head]] * bool(head) + [whole[i : i + 3] for i in range(head, len(whole), 3)]
    behind += "0" * draw(st.integers(0, 3))
    text = separator.join(groups) + (f".{behind}" if behind else "")
    currency = draw(st.sampled_from(["", "$", "\u20ac", "\u00a3 ", "\\$"])) if unit else ""
    sign = draw(st.sampled_from(["-", "\u2212", "- "] if value < 0 else ["", "+"]))
    text = draw(st.sampled_from([sign + currency, currency + sign])) + text
    units = ["", "%", " dollars", " eggs a day", " \u20ac"] if unit and not currency else [""]
    text += draw(st.sampled_from(units))
    mark = draw(st.sampled_from(["", "**", "`"]))
    space = st.sampled_from(["", " "])
    return Written(value, draw(space) + mark + text + draw(st.sampled_from(["", "."])) + mark)


def decimals() -> st.SearchStrategy[Fraction]:
    return st.builds(
        lambda digits, places: Fraction(digits, 10**places),
        st.integers(-(10**13), 10**13),
        st.integers(0, 4),
    )


@st.composite
def ways(draw: st.DrawFn) -> tuple[Written, Written]:
    """The same number twice, once without a unit."""
    value = st.just(draw(decimals()))
    return draw(written(value)), draw(written(value, unit=False))


def gsm8k(answer: str, reference: str) -> float | None:
    sample = Sample("r:1", "", f"Let me see.\n#### {answer}", f"So.\n#### {reference}", True, 9)
    return make_grader("gsm8k_answer")(sample)


@settings(deadline=None, max_examples=300)
@given(ways())
def test_one_number_in_two_ways_is_right(two: tuple[Written, Written]) -> None:
    assert gsm8k(two[0].text, two[1].text) == 1.0


@settings(deadline=None, max_examples=300)
@given(written(), written())
def test_two_numbers_are_never_the_same(one: Written, other: Written) -> None:
    assume(one.value != other.value)
    assert gsm8k(one.text, other.text) == 0.0


@settings(deadline=None, max_examples=300)
@given(decimals(), st.sampled_from([-1, 1]), st.integers(0, 4), st.data())
def test_nor_are_two_that_differ_in_one_digit(
    value: Fraction, sign: int, place: int, data: st.DataObject
) -> None:
    near = value + Fraction(sign, 10**place)
    one, other = data.draw(written(st.just(value))), data.draw(written(st.just(near)))
    assert gsm8k(one.text, other.text) == 0.0


@settings(deadline=None)
@given(st.integers(-99, 99), st.integers(1, 99), st.integers(1, 9))
def test_fractions_are_compared_exactly(over: int, under: int, by: int) -> None:
    assert number(f"{over}/{under}") == number(f"{over * by}/{under * by}") == Fraction(over, under)


# Units --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        # one number, and a unit on one side or the same on both
        ("18 dollars", "18", 1.0),
        ("18", "18 dollars", 1.0),
        ("$18", "18 dollars", 1.0),
        ("$18 per day", "18 dollars per day", 1.0),
        ("1 egg", "1 eggs", 1.0),
        ("5 feet", "5 ft", 1.0),
        ("5%", "5 percent", 1.0),
        ("5 miles/hour", "5 mile per hour", 1.0),
        ("5 miles/hour", "5 miles/minute", 0.0),
        ("5 lakh rupees", "500,000 rupees", 1.0),
        ("\u20b95 lakh", "500,000", 1.0),
        ("5 km\u00b2", "5 km\u00b2", 1.0),
        # another unit, power or scale
        ("5 km\u00b2", "5 km\u00b3", 0.0),
        ("5 square meters", "5 cubic meters", 0.0),
        ("5 km\u00b2", "5 km", 0.0),
        ("5 miles", "5 miles per hour", 0.0),
        ("5 hours", "5 minutes", 0.0),
        ("$5", "5 euros", 0.0),
        ("$5", "5 cents", 0.0),
        ("5%", "5 dollars", 0.0),
        ("20 \u00b0C", "20 \u00b0F", 0.0),
        ("5 lakh", "5 crore", 0.0),
        ("5 million", "5 billion", 0.0),
        ("5 million", "5", 0.0),
        # what is not understood is itself and nothing else
        (r"4\pi", "4", 0.0),
        ("4", r"4\pi", 0.0),
        (r"4\pi", r"4\pi", 1.0),
        ("2x", "2y", 0.0),
        ("2x", "2x", 1.0),
        ("5i", "5", 0.0),
        ("5\u00b2", "5", 0.0),
        ("5 m\u00b2", "5 m\u00b3", 0.0),
        ("5 hundredths", "5 thousandths", 0.0),
        ("5 hundredths", "5", 0.0),
        ("5  hundredths", "5 hundredths", 1.0),
        ("5!", "5", 0.0),
        ("5k", "5", 0.0),
    ],
)
def test_a_number_of_something_else_is_wrong(
    grade: Grade, answer: str, reference: str, expected: float
) -> None:
    sides = (f"<answer>{answer}</answer>", f"<answer>{reference}</answer>")
    assert grade("think_answer_value", *sides) == expected
    if expected == 0.0 and number(reference) is not None:
        assert gsm8k(answer, reference) == 0.0


# GSM8K --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("9 * 2 = <<9*2=18>>18\n#### 18", 1.0),
        ("#### $18.00 per day", 1.0),
        ("####18", 1.0),
        ("####   18\n", 1.0),
        ("so it is #### 18", 1.0),
        ("**#### 18**", 1.0),
        ("#### 18\r\n", 1.0),
        ("#### 17\nNo, wait.\n#### 18", 1.0),
        ("#### 18\nShe sells 5 more.", 1.0),
        ("#### 18\n##### Note", 1.0),
        ("#### 18\nNo, wait.\n#### 17", 0.0),
        ("#### 18\nNo, wait.\n#### eighteen", 0.0),
        ("#### 18\n####", 0.0),
        ("####\n18", 0.0),
        ("#### 180", 0.0),
        ("#### 1 8", 0.0),
        ("#### -18", 0.0),
        ("18", 0.0),
        ("The answer is 18.", 0.0),
        ("### 18", 0.0),
        ("##### 18", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_answer(grade: Grade, output: str, expected: float) -> None:
    assert grade("gsm8k_answer", output, "It is so.\n#### 18") == expected


@pytest.mark.parametrize("reference", ["", "18", "It is 18.", "#### eighteen", "#### 1,5"])
def test_gsm8k_answer_does_not_apply_without_a_number_in_the_reference(
    grade: Grade, reference: str
) -> None:
    assert grade("gsm8k_answer", "#### 18", reference) is None


def test_no_reference_at_all_can_be_told(grade: Grade) -> None:
    assert score([grade("gsm8k_answer", "#### 18", text) for text in ("18", "", "x")]) is None


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("She has 9 * 2 = 18.\n#### 18", 1.0),
        ("#### 18", 1.0),
        ("so\n#### -18\n", 1.0),
        ("so\n#### 1,234.50", 1.0),
        ("so\r\n#### 18\r\n", 1.0),
        ("so\n#### $18", 0.0),
        ("so\n#### 18.", 0.0),
        ("so\n#### 18 dollars", 0.0),
        ("so\n#### eighteen", 0.0),
        ("so\n####18", 0.0),
        ("so #### 18", 0.0),
        ("so\n##### 18", 0.0),
        ("so\n### 18", 0.0),
        ("so\n#### 18\nand more", 0.0),
        ("#### 17\n#### 18", 0.0),
        ("so\n#### ", 0.0),
        ("so\n#### 1,23", 0.0),
        ("", 0.0),
    ],
)
def test_gsm8k_format(grade: Grade, output: str, expected: float) -> None:
    assert grade("gsm8k_format", output) == expected


def test_an_answer_that_was_cut_off_has_no_format(sample: Make) -> None:
    """The limit may have cut 18 down to 1."""
    cut = sample("so\n#### 1", stopped=False)
    assert make_grader("gsm8k_format")(cut) == 0.0
    thought = sample("<think>a</think><answer>1</answer>", stopped=False)
    assert make_grader("think_answer")(thought) == 0.0


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_reference_of_gsm8k_is_right_and_well_formed(
    shared_dir: Path, sample: Make, split: str
) -> None:
    answer, form = make_grader("gsm8k_answer"), make_grader("gsm8k_format")
    lines = (shared_dir / "data" / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
    references = [json.loads(line)["answer"] for line in lines]
    assert len(references) == {"train": 7473, "test": 1319}[split]
    for reference in references:
        graded = sample(reference, reference)
        # Read another way: the digits behind the last mark, without commas.
        plain = reference.split("####")[-1].strip().replace(",", "")
        assert final_answer(reference) == Quantity(Fraction(plain)), reference
        assert (answer(graded), form(graded)) == (1.0, 1.0), reference
        wrong = sample(f"#### {Fraction(plain) + 1}", reference)
        assert answer(wrong) == 0.0, reference


# <think> and <answer> -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("<think>9 * 2</think><answer>18</answer>", 1.0),
        ("\n<think>\n9 * 2\n\nis 18\n</think>\n\n<answer>\n18\n</answer>\n", 1.0),
        ("<think></think><answer>18</answer>", 1.0),
        ("<think>if a < b</think><answer>x > y</answer>", 1.0),
        ("<think>9</think><answer></answer>", 0.0),
        ("<think>9</think><answer> \n</answer>", 0.0),
        ("<answer>18</answer>", 0.0),
        ("<think>9</think>", 0.0),
        ("<think>9</think>18", 0.0),
        ("<think>9</think><answer>18", 0.0),
        ("<think>9<answer>18</answer></think>", 0.0),
        ("<answer>18</answer><think>9</think>", 0.0),
        ("Well: <think>9</think><answer>18</answer>", 0.0),
        ("<think>9</think> so <answer>18</answer>", 0.0),
        ("<think>9</think><answer>18</answer> there", 0.0),
        ("<think>9</think><think>10</think><answer>18</answer>", 0.0),
        ("<think>9</think><answer>18</answer><answer>19</answer>", 0.0),
        ("<think><think>9</think><answer>18</answer>", 0.0),
        ("<THINK>9</THINK><ANSWER>18</ANSWER>", 0.0),
        ("", 0.0),
    ],
)
def test_think_answer(grade: Grade, output: str, expected: float) -> None:
    assert grade("think_answer", output) == expected


@pytest.mark.parametrize(
    ("output", "reference", "expected"),
    [
        ("<think>a</think><answer>18</answer>", "<think>b</think><answer>18</answer>", 1.0),
        ("<answer>$18.00</answer>", "<answer> 18\n</answer>", 1.0),
        ("no thoughts, <answer>18 dollars</answer> then", "<answer>18</answer>", 1.0),
        ("<answer>New  York\n</answer>", "<answer>New York</answer>", 1.0),
        ("<answer>new york</answer>", "<answer>New York</answer>", 0.0),
        ("<answer>18</answer>", "9 * 2\n#### 18", 1.0),
        ("<answer>19</answer>", "9 * 2\n#### 18", 0.0),
        ("<answer>eighteen</answer>", "<answer>18</answer>", 0.0),
        ("<answer>18</answer><answer>18</answer>", "<answer>18</answer>", 0.0),
        ("<answer>18", "<answer>18</answer>", 0.0),
        ("#### 18", "<answer>18</answer>", 0.0),
        ("18", "<answer>18</answer>", 0.0),
        ("", "<answer>18</answer>", 0.0),
        ("<answer>18</answer>", "18", None),
        ("<answer></answer>", "<answer></answer>", None),
        ("<answer>18</answer>", "<answer>1</answer><answer>2</answer>", None),
        ("18", "", None),
    ],
)
def test_think_answer_value(
    grade: Grade, output: str, reference: str, expected: float | None
) -> None:
    assert grade("think_answer_value", output, reference) == expected


def test_no_wrong_answer_gets_a_point(grade: Grade, hard_pairs: list[Any]) -> None:
    """Agreement on 200 pairs of answers judged by hand; the docs count the misses."""
    graded = [
        grade(
            "think_answer_value", f"<answer>{p.answer}</answer>", f"<answer>{p.reference}</answer>"
        )
        for p in hard_pairs
    ]
    assert len(hard_pairs) == 200
    given = [pair for pair, value in zip(hard_pairs, graded, strict=True) if value == 1.0]
    assert [pair for pair in given if not pair.right] == []
    assert (len(given), sum(pair.right for pair in hard_pairs)) == (41, 89)
