"""The grader `math`: what math-verify gets to compare, and no point for a wrong answer.

The extra dev brings the library. Without it the tests that need it are skipped.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from torchprime.errors import RuntimeSetupError
from torchprime.evaluation.graders import formulas as math_grading
from torchprime.evaluation.graders.answers import final_answer
from torchprime.evaluation.graders.formulas import FormulaComparer, answer_of, same_answer
from torchprime.evaluation.graders.make import Sample, make_grader

needs_library = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None,
    reason="math-verify is not installed: pip install 'torchprime[math]'",
)


class Asked:
    """A stand-in for math-verify that says yes and records what it was asked."""

    def __init__(self) -> None:
        self.pairs: list[tuple[str, str]] = []

    def equal(self, gold: str, answer: str) -> bool:
        self.pairs.append((gold, answer))
        return True


def asked(reference: str, answer: str) -> tuple[bool, list[tuple[str, str]]]:
    comparer = Asked()
    return same_answer(reference, answer, comparer), comparer.pairs  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{1} or rather \boxed{2}", "2"),
        ("<think>#### 3</think><answer> 4\\pi </answer>", r"4\pi"),
        ("<answer>1</answer><answer>2</answer>", None),
        ("It is so.\n#### 18 dollars\n", "18 dollars"),
        ("18", "18"),
        ("The answer\nis 18", None),
        ("", None),
        (r"\boxed{}", None),
        (r"\boxed{1", r"\boxed{1"),
        ("#### " + "1" * 300, None),
    ],
)
def test_the_answer_that_a_text_marks(text: str, answer: str | None) -> None:
    assert answer_of(text) == answer


@pytest.mark.parametrize(
    ("reference", "answer", "pairs"),
    [
        (r"4\pi", r"\pi 4", [(r"4\pi", r"\pi 4")]),
        ("0.5", r"\frac12", [(r"\frac{1}{2}", r"\frac12")]),
        ("-3 1/2", "$x$", [(r"\frac{-7}{2}", "x")]),
        (r"\(x^2\)", "$$x^2+0$$", [("x^2", "x^2+0")]),
        (r"45^\circ", "45", []),
        (r"18\text{ dollars}", r"\$18", []),
        ("2xy", "sin x", [("2xy", "sin x")]),
        ("18", "$18", []),
        (r"1{,}000", r"1\,000", []),
        ("x = 5", "5", [("x = 5", r"\frac{5}{1}")]),
        (r"\{1,2\}", r"\{2,1\}", [(r"\{1,2\}", r"\{2,1\}")]),
    ],
)
def test_formulas_are_given_to_the_library(reference: str, answer: str, pairs: list) -> None:
    assert asked(reference, answer) == (True, pairs)


@pytest.mark.parametrize(
    "answer",
    ["1e3", "2x3", "2**3", "3:30", "1.2.3", "5'", "$5m", "2 5", "5²", "1,5", "5 pm", "5th", "ton",
     "5 hundredths", r"5\text{ m}^2", "{1", "π", "18 or 20",
     r"5\ldots", r"0.3\dots", r"x\approx 5", r"5\bmod 7", r"5\ 6", r"5\quad 6", "{5}{6}", "10_2",
     "5_{8}", "x^T", "1/2x", r"1/2\pi", "x/2y", "x=y=5", "$5 and $6", "x + \\", r"\boxed{5}6"],
)  # fmt: skip
def test_what_may_be_no_formula_is_a_text(answer: str) -> None:
    assert asked("7", answer) == (False, [])
    assert asked(answer, answer) == (True, [])


def test_without_the_library_one_message_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(math_grading.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeSetupError) as error:
        make_grader("math", key="eval.graders[1]")
    assert str(error.value) == (
        "eval.graders[1].kind: math needs the package math-verify, which is not installed. "
        "pip install 'torchprime[math]', or choose another kind."
    )


# With the library ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def comparer() -> Iterator[FormulaComparer]:
    found = FormulaComparer()
    yield found
    found.close()


@needs_library
def test_no_wrong_answer_gets_a_point_either(
    sample: Callable[..., Sample], hard_pairs: list[Any]
) -> None:
    """Agreement on the 200 pairs judged by hand; the docs explain the misses."""
    grader = make_grader("math")
    given = [pair for pair in hard_pairs if grader(sample(pair.answer, pair.reference)) == 1.0]
    assert [pair for pair in given if not pair.right] == []
    assert (len(given), sum(pair.right for pair in hard_pairs)) == (81, 89)


@needs_library
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("X", "x"), ("5", "3=5"), ("5", "2+2=5"), ("(1,2)", r"\{1,2\}"),
        ("10^{-20}", "10^{-21}"), (r"6.6\cdot10^{-34}", r"6.7\cdot10^{-34}"),
        ("10^{-20}x", "10^{-21}x"), ("(1,10^{-20})", "(1,10^{-21})"),
        (r"\{1,10^{-20}\}", r"\{1,10^{-21}\}"), ("1+10^{-9}", "1"),
        ("AB", "BA"), (r"\sqrt[3]{8}", r"\sqrt{8}"), (r"3\frac12", r"\frac32"),
        (r"\frac{\pi}{2}", "90"), (r"\sin x^2", r"\sin^2 x"), ("5", r"\pm 5"),
    ],
)  # fmt: skip
def test_what_the_library_alone_may_take_for_equal(
    comparer: FormulaComparer, one: str, other: str
) -> None:
    """Most of these are equal for math-verify in one direction at least."""
    assert not same_answer(one, other, comparer)
    assert not same_answer(other, one, comparer)


@needs_library
@pytest.mark.parametrize(
    ("one", "other"),
    [("10^{-20}", r"\frac{1}{10^{20}}"), (r"\{\sqrt{4},1\}", r"\{1,2\}"), ("x=5", "5"),
     (r"(1, \frac{2}{4})", r"(1, \frac12)"), ("1{,}000", "10^3")],
)  # fmt: skip
def test_what_is_equal_is_right(comparer: FormulaComparer, one: str, other: str) -> None:
    assert same_answer(one, other, comparer)


@needs_library
def test_an_answer_is_never_run_as_python(comparer: FormulaComparer, tmp_path: Path) -> None:
    path = tmp_path / "made"
    assert not comparer.equal("5", f"__import__('os').mkdir({str(path)!r})")
    assert not path.exists()


@needs_library
def test_a_formula_without_an_end_is_wrong_and_the_next_is_judged(
    comparer: FormulaComparer, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert comparer.equal("2x", "x2")  # it has started
    with monkeypatch.context() as patch:
        patch.setattr(math_grading, "SECONDS", 1.0)
        assert not comparer.equal("9^{9^{9^{9}}}", "1")
    assert comparer.equal("2x", "x2")


@needs_library
@pytest.mark.parametrize(
    "formula", ["", "{", "\\frac{", "\\boxed{}", "1/0", "}{", '"\n', "\\" * 99]
)
def test_odd_formulas_end_nothing(comparer: FormulaComparer, formula: str) -> None:
    assert not comparer.equal(formula, formula)
    assert comparer.equal("2x", "x2")


@needs_library
def test_the_grader(sample: Callable[..., Sample]) -> None:
    grader = make_grader("math")
    assert grader(sample(r"So \boxed{\frac{2\pi}{4}}", r"\boxed{\pi/2}")) == 1.0
    assert grader(sample(r"So \boxed{2\pi}", r"\boxed{\pi/2}")) == 0.0
    assert grader(sample("No answer.\nAt all.", "#### 18")) == 0.0
    assert grader(sample("#### 18", "No answer.\nAt all.")) is None


@needs_library
@pytest.mark.slow
def test_the_library_reads_all_references_as_we_do(shared_dir: Path) -> None:
    """8,792 of GSM8K and 1,000 of SVAMP. It does not take the next number for the right one."""
    import math_verify

    texts = [
        json.loads(line)["answer"]
        for split in ("train", "test")
        for line in (shared_dir / "data" / "gsm8k" / f"{split}.jsonl").read_text().splitlines()
    ]
    svamp = json.loads((shared_dir / "data" / "svamp.json").read_text())
    texts += [f"#### {row['Answer']}" for row in svamp]
    assert len(texts) == 9792

    def parsed(text: str) -> Any:
        return math_verify.parse(text, parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    for text in texts:
        ours, tail = final_answer(text), text.rpartition("####")[2].strip()
        theirs = parsed(f"\\boxed{{{tail}}}")
        assert ours is not None and Fraction(str(theirs[0])) == ours.number, tail
        next_one = parsed(f"\\boxed{{{ours.number + 1}}}")
        assert not math_verify.verify(theirs, next_one, timeout_seconds=None), tail
