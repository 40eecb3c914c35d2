"""One generated answer, as graders see it.

Generation makes it from a held-out row; graders read it; a line of `evaluations/step_*.jsonl` is it
together with its grades.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A held-out row, what the model wrote for it and what the row says."""

    row_id: str  # by which a person finds the row again
    prompt: str  # what a person reads: the question
    output: str  # decoded, without the stop token
    reference: str  # the row's own completion
    stopped: bool  # ended by a stop token, not by the limit
    tokens: int  # generated, without the stop token


# 1 or 0 for pass or fail, any finite number for a measure; None where it does not apply to the row,
# which is then not counted.
Grader = Callable[[Sample], float | None]
