"""A process beside the run's that compares formulas with math-verify, a line for a line.

    {"gold": "4\\pi", "answer": "\\pi \\cdot 4"}  ->  {"equal": true}

sympy, which computes it, can take any time and memory for a formula of a few characters. So it does
not run in the run's own process: whoever started this one ends it when it takes too long, and the
system when it takes too much.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

MEMORY = 4 << 30  # bytes of address space
DIGITS = 12  # two numbers that differ in one of these, counted from the first that is not 0, differ


def main() -> None:
    """Answer each line of stdin on stdout."""
    _limit_memory()
    logging.disable(logging.ERROR)  # it warns of having no time limit of its own
    answers, sys.stdout = sys.stdout, sys.stderr  # so that no library writes between the answers
    # late: after the limit, which holds for them too
    import latex2sympy2_extended  # pyright: ignore[reportMissingImports]
    import math_verify  # pyright: ignore[reportMissingImports]
    import sympy

    # By default it takes units away, among them "o", "ab" and the power of m^2.
    spelling = latex2sympy2_extended.NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="all"
    )
    # LaTeX alone: the other reader evaluates its text as Python.
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
    """Return True for a formula of sympy's without 1/0 in it."""
    if not isinstance(value, sympy.Basic | sympy.MatrixBase):
        return False
    return not value.has(sympy.zoo, sympy.nan)


def _near(sympy: Any, gold: Any, answer: Any) -> bool:
    """Return False if two equal formulas differ in a digit that math-verify rounds away.

    It rounds to a place behind the point: all numbers below 1e-15 are one for it. Here the place is
    counted from the first digit, at some value of the variables.
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
        import resource  # late: Windows has none

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except (ImportError, ValueError, OSError):  # a system without such limits
        return


if __name__ == "__main__":
    main()
