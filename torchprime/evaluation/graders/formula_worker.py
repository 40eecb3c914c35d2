"""A separate process that compares formulas with math-verify, one line in, one line out.

    {"gold": "4\\pi", "answer": "\\pi \\cdot 4"}  ->  {"equal": true}

sympy, which does the work, can need any amount of time and memory for a formula of a few
characters. So it does not run in the run's own process: the parent process ends this one when it
takes too long, and the operating system when it takes too much memory.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

MEMORY = 4 << 30  # bytes of address space
DIGITS = 12  # numbers whose significant digits up to this one differ are different


def main() -> None:
    """Answer each line of stdin on stdout."""
    _limit_memory()
    logging.disable(logging.ERROR)  # it warns that it has no time limit of its own
    answers, sys.stdout = sys.stdout, sys.stderr  # so that no library writes between the answers
    # late: after the memory limit, which must hold for it too
    import latex2sympy2_extended  # pyright: ignore[reportMissingImports]
    import math_verify  # pyright: ignore[reportMissingImports]
    import sympy

    # By default it removes units, among them "o", "ab" and the power of m^2.
    spelling = latex2sympy2_extended.NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="all"
    )
    # Only LaTeX: the other parser evaluates its text as Python.
    config = [math_verify.LatexExtractionConfig(normalization_config=spelling)]

    def parsed(formula: str) -> Any:
        text = f"\\boxed{{{formula}}}"
        found = math_verify.parse(text, config, parsing_timeout=None)  # pyright: ignore
        return found[0] if found and _finite(sympy, found[0]) else None

    def equal(gold: Any, answer: Any) -> bool:
        return (
            gold is not None
            and answer is not None
            and math_verify.verify(gold, answer, float_rounding=DIGITS, timeout_seconds=None)
            and _near(sympy, gold, answer)
        )

    def tell(**values: bool) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    tell(ready=True)
    for line in sys.stdin:
        given = json.loads(line)
        try:
            told = bool(equal(parsed(given["gold"]), parsed(given["answer"])))
        except (Exception, RecursionError, MemoryError):
            told = False
        tell(equal=told)


def _finite(sympy: Any, value: Any) -> bool:
    """Return True for a sympy formula without 1/0 in it."""
    if not isinstance(value, sympy.Basic | sympy.MatrixBase):
        return False
    return not value.has(sympy.zoo, sympy.nan)


def _near(sympy: Any, gold: Any, answer: Any) -> bool:
    """Return False if two equal formulas differ in a digit that math-verify rounds away.

    It rounds to a decimal place: it treats all numbers below 1e-15 as equal. Here significant
    digits are counted, at some value of the variables.
    """
    if isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr):
        names = sorted((gold.free_symbols | answer.free_symbols), key=str)
        at = {name: sympy.Rational(7 * n + 10, 9) for n, name in enumerate(names)}
        one, other = gold.subs(at), answer.subs(at)
        if not (one.is_number and other.is_number):
            return True
        size = max(abs(sympy.N(one, 40)), abs(sympy.N(other, 40)))
        return bool(abs(sympy.N(one - other, 40)) <= size / 10**DIGITS)
    same_kind = type(gold) is type(answer) and isinstance(gold, sympy.Basic)
    if not same_kind or len(gold.args) != len(answer.args):
        return True
    if isinstance(gold, sympy.FiniteSet):
        return all(any(_near(sympy, a, b) for b in answer.args) for a in gold.args)
    return all(_near(sympy, a, b) for a, b in zip(gold.args, answer.args, strict=True))


def _limit_memory() -> None:
    try:
        import resource  # late: Windows has no such module

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # a system without such limits
        return


if __name__ == "__main__":
    main()
