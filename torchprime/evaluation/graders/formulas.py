r"""A grader of mathematics by math-verify: \frac{1}{2} is 0.5, and 2\pi is \pi \cdot 2.

    the answer in \boxed{}, <answer> or after ####  ->  quantities, as our other graders compare
    them; else formulas, which math-verify compares; else texts

math-verify alone grades by a text's first number: it reads "5 hundredths" as 5, and "1e3" as 1.
So it gets formulas only. A text with words, an unknown spelling of a number, or
letters that may be words, is compared as a text.
"""

from __future__ import annotations

import importlib.util
import json
import select
import subprocess
import sys

import regex

from torchprime.errors import RuntimeSetupError
from torchprime.evaluation.graders.answers import ANSWER, MARKER
from torchprime.evaluation.graders.quantities import LONGEST, Quantity, quantity
from torchprime.evaluation.graders.samples import Grader, Sample

SECONDS = 5.0  # for one comparison
START_SECONDS = 120.0  # sympy is large
BOXED = regex.compile(r"\\boxed\s*(\{(?:[^{}]++|(?1))*+\})")
WORDS = regex.compile(r"\\(?:text|textbf|textit|mathrm|mbox)\s*\{([^{}]*)\}")
DELIMITERS = regex.compile(r"\\[()\[\]]")
DOLLARS = regex.compile(r"\$(\$?)([^$]*)\$\1")
SPACES = regex.compile(r"\\[,;: ]|~|\\q?quad(?!\p{L})")
TIGHT = regex.compile(r"\\!|(?<=[0-9])\{(?=,\})|(?<=[0-9]\{?,)\}(?=[0-9])")  # 1{,}000
DEGREES = regex.compile(r"\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})")
# Functions that may be written without a backslash, and variables that may be written side by side.
FUNCTIONS = {"sin", "cos", "tan", "cot", "sec", "csc", "ln", "log", "exp", "sqrt", "arcsin",
             "arccos", "arctan", "sinh", "cosh", "tanh", "max", "min", "gcd", "lcm"}  # fmt: skip
LETTERS = regex.compile(r"(?<![\\\p{L}])\p{L}{2,}")
VARIABLES = regex.compile("[abcxyz]+")
VARIABLE = regex.compile(r"(?<![\\\p{L}])[abcxyz]+(?!\p{L})|(?<!\p{L})\p{L}(?!\p{L})")
# math-verify misreads these or drops a part of them. Each line names its examples.
NO_FORMULA = regex.compile(
    r"""
    [0-9]\s*[eE]\s*[-+]?[0-9] | [0-9]\s*[xX]\s*[0-9] | \*\*    # 1e3, 2x3, 2**3
    | [0-9]\s*:\s*[0-9] | \.[0-9]+\. | [0-9]\s+[0-9]           # 3:30, 1.2.3, 5 6
    | \$ | ' | [^\x00-\x7f] | \\$ | \\boxed                    # money, primes, no LaTeX
    | [0-9)}\]]\s*_ | \^\s*\{?\s*[TH*](?!\p{L})                # another base, a transposed matrix
    | (?<!\\\p{L}+\s*|\\|[\^_}\]]\s*)\{                        # {5}{6}
    | \\(?:[lc]?dots[bcimo]? | ldotp | approx | sim(?:eq)? | [bp]?mod | prime | neg | lor | land
        )(?!\p{L})                                             # 5\ldots, x \approx 5, 5 \bmod 7
    | /\s*[0-9.]+\s*(?:\\?\p{L}|\() | /\s*\p{L}\s*(?:\\?\p{L}|\()  # 1/2x
    """,
    regex.VERBOSE,
)
COMMA = regex.compile(r"[0-9]\s*,\s*[0-9]")
EQUATION = regex.compile(r"(?<![\\<>!])=")
BRACKETS = {"\\{": "\\}", "(": ")]", "[": ")]"}


def math_grader(key: str) -> Grader:
    """Build a grader: 1 if output and reference are the same answer, compared by math-verify.

    Raises:
        RuntimeSetupError: math-verify is not installed, or does not start.
    """
    if importlib.util.find_spec("math_verify") is None:
        raise RuntimeSetupError(
            f"{key}.kind: math needs the package math-verify, which is not installed. "
            "pip install 'torchprime[math]', or choose another kind."
        )
    comparer = FormulaComparer()

    def grade(sample: Sample) -> float | None:
        wanted = answer_of(sample.reference)
        if wanted is None:
            return None
        given = answer_of(sample.output)
        return float(given is not None and same_answer(wanted, given, comparer))

    return grade


def answer_of(text: str) -> str | None:
    """Return the answer that a text marks: its last \\boxed{}, its only <answer> block, or the text
    after its last ####. A text of one line without a mark is an answer itself."""
    if boxed := BOXED.findall(text):
        answer = boxed[-1][1:-1]
    elif "<answer>" in text:
        blocks = ANSWER.findall(text)
        answer = blocks[0] if len(blocks) == 1 else ""
    elif lines := MARKER.findall(text):
        answer = lines[-1]
    else:
        answer = "" if "\n" in text.strip() else text
    answer = answer.strip()
    return answer if 0 < len(answer) <= LONGEST else None


def same_answer(reference: str, answer: str, comparer: FormulaComparer) -> bool:
    """Return True if two answers are the same; `comparer` is called if both are formulas."""
    bare = [_without_marks(text) for text in (reference, answer)]
    texts = [" ".join(WORDS.sub(r" \1 ", text).split()) for text in bare]
    values = [quantity(text) for text in texts]
    if values[0] is not None and values[1] is not None:
        return values[0].agrees(values[1])
    if texts[0] == texts[1]:
        return True
    formulas = [_formula(text, value) for text, value in zip(bare, values, strict=True)]
    if formulas[0] is None or formulas[1] is None or not _comparable(formulas[0], formulas[1]):
        return False
    return comparer.equal(formulas[0], formulas[1])


def _without_marks(text: str) -> str:
    """Return a text without the marks around formulas and LaTeX's spaces."""
    inside = DOLLARS.fullmatch(text.strip())
    bare = DELIMITERS.sub(" ", inside[2] if inside else text)
    return DEGREES.sub("\u00b0", TIGHT.sub("", SPACES.sub(" ", bare))).strip()


def _formula(text: str, value: Quantity | None) -> str | None:
    """Return the formula for math-verify; None for a text that may not be a formula."""
    if value is not None:
        number = value.number
        return f"\\frac{{{number.numerator}}}{{{number.denominator}}}"
    known = (word in FUNCTIONS or VARIABLES.fullmatch(word) for word in LETTERS.findall(text))
    if not all(known) or WORDS.search(text) or NO_FORMULA.search(text):
        return None
    if text.count("{") != text.count("}") or len(EQUATION.findall(text)) > 1:
        return None
    if COMMA.search(text) and not regex.search(r"[(\[{]", text):
        return None
    return text


def _comparable(one: str, other: str) -> bool:
    """Return False for two formulas that math-verify wrongly treats as equal."""
    names = [{c for name in VARIABLE.findall(text) for c in name} for text in (one, other)]
    if any(name.swapcase() in names[1] and name not in names[1] for name in names[0]):
        return False  # math-verify ignores case: X and x
    kinds = [_brackets(text) for text in (one, other)]
    if None not in kinds and kinds[0] != kinds[1]:
        return False  # a pair is no set
    sides = [EQUATION.split(text) for text in (one, other)]
    if len(sides[0]) != len(sides[1]):
        equation = max(sides, key=len)
        return bool(regex.fullmatch(r"\\?\p{L}+", equation[0].strip()))  # x = 5, but not 2+2 = 5
    return True


def _brackets(text: str) -> str | None:
    """Return "{" or "(" for a set, a pair or an interval; None for another formula."""
    opening = next((each for each in BRACKETS if text.startswith(each)), None)
    if opening is None or "," not in text or not text.endswith(tuple(BRACKETS[opening])):
        return None
    return "{" if opening == "\\{" else "("


class FormulaComparer:
    """A process that runs math-verify (formula_worker.py), started on first use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def equal(self, gold: str, answer: str) -> bool:
        """Return True if the formulas are equal; False also if the process needs more than
        SECONDS."""
        process = self._process or self._started()
        assert process.stdin is not None
        try:
            line = json.dumps({"gold": gold, "answer": answer}) + "\n"
            process.stdin.write(line.encode())
            process.stdin.flush()
            told = self._line(process, SECONDS)
        except OSError:
            told = None
        if told is None:
            self.close()
            return False
        return bool(told["equal"])

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "torchprime.evaluation.graders.formula_worker"]
        self._process = process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        if self._line(process, START_SECONDS) is None:
            self.close()
            raise RuntimeSetupError(
                "eval.graders: the process for graders of kind math did not start; its error is "
                "above. Reinstall math-verify: pip install 'torchprime[math]'."
            )
        return process

    @staticmethod
    def _line(process: subprocess.Popen[bytes], seconds: float) -> dict[str, bool] | None:
        """Return the process's next line; None if none arrives in time."""
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            return None
        line = process.stdout.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        """End the process; the next comparison starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __del__(self) -> None:
        self.close()
