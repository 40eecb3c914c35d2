"""The input of graders: one generated answer with its held-out row.

Generation makes it from a held-out row; graders read it; a line of `evaluations/step_*.jsonl` is
a sample together with its grades.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Sample:
    """A held-out row, the model's answer to it and the row's reference."""

    row_id: str  # identifies the row for a reader
    prompt: str  # the question as text for a reader
    output: str  # decoded, without the stop token
    reference: str  # the row's own completion
    stopped: bool  # ended by a stop token, not by the limit
    tokens: int  # number of generated tokens, without the stop token


# 1 or 0 for pass or fail, any finite number for a measure; None if it does not apply to the row,
# which is then not counted.
Grader = Callable[[Sample], float | None]
