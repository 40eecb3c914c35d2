"""Right answers as training rows: which of a row's answers are kept, and the record of each.

The records have the fields of `prompt_completion` or `messages`, so that `dataset=file` reads them
as they are. Their key `provenance` is for people, and no reader uses it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchprime.data.rows.read import Row
from torchprime.evaluation.behaviour import Grades
from torchprime.evaluation.graders.samples import Sample

Graded = tuple[Sample, Grades]


@dataclass(frozen=True)
class KeepRule:
    """The rule for the answers that are kept.

    Attributes:
        by: graders that pass or fail. Those that apply to a row have to pass its answer, and one
            has to apply.
        failing: those of them whose 1 is a failure (`refusal`).
        most: of a row, the shortest in tokens; None for all.
    """

    by: Sequence[str]
    failing: Collection[str] = ()
    most: int | None = None

    def is_right(self, grades: Grades) -> bool:
        """Return True if every grader that applies passes, and one applies."""
        found = [
            grade == (0.0 if name in self.failing else 1.0)
            for name in self.by
            if (grade := grades[name]) is not None
        ]
        return bool(found) and all(found)

    def keep(self, graded: Sequence[Graded]) -> list[int]:
        """Return the places of the answers of one row to keep, the shortest first.

        An answer that the limit cut is not kept: training would teach to stop there. Of equal texts
        the first is kept.
        """
        right = [
            (sample.tokens, place, sample.output.strip())
            for place, (sample, grades) in enumerate(graded)
            if sample.stopped and self.is_right(grades)
        ]
        kept: dict[str, int] = {}
        for _, place, text in sorted(right):
            kept.setdefault(text, place)
        return list(kept.values())[: self.most]


@dataclass(frozen=True)
class KeptCounts:
    """The result of a choice: rows and answers, and what became of them."""

    rows: int
    answers: int
    right: int
    cut: int  # right, but not ended by a stop token
    rows_with_right: int
    kept: int

    def describe(self) -> str:
        """Return a line for the user."""
        dropped = self.right - self.cut - self.kept
        return (
            f"{self.right:,} of {self.answers:,} answers are right "
            f"({self.right / max(self.answers, 1):.1%}), for {self.rows_with_right:,} of "
            f"{self.rows:,} rows; kept {self.kept:,} (left out {dropped:,} that repeat another or "
            f"are beyond --keep, {self.cut:,} that the limit cut)"
        )


def count_kept(rule: KeepRule, rows: Sequence[Sequence[Graded]]) -> KeptCounts:
    """Count what the rule makes of the answers of each row."""
    right = [[pair for pair in graded if rule.is_right(pair[1])] for graded in rows]
    return KeptCounts(
        rows=len(rows),
        answers=sum(map(len, rows)),
        right=sum(map(len, right)),
        cut=sum(not sample.stopped for pairs in right for sample, _ in pairs),
        rows_with_right=sum(map(bool, right)),
        kept=sum(len(rule.keep(graded)) for graded in rows),
    )


def kept_records(
    row: Row, graded: Sequence[Graded], rule: KeepRule, provenance: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """Yield the training records of one row.

    Args:
        graded: the row's answers, in the order of sampling.
        provenance: of all answers; the row's id and the answer's number and grades are added.
    """
    for place in rule.keep(graded):
        sample, grades = graded[place]
        own = {"row_id": row.row_id, "answer": place, "tokens": sample.tokens, "grades": grades}
        yield {**_record(row, sample.output), "provenance": {**own, **provenance}}


def _record(row: Row, answer: str) -> dict[str, Any]:
    """Return a row with another answer, as the reader of training rows takes it."""
    weight = {} if row.weight == 1.0 else {"weight": row.weight}
    if not row.messages:
        return {"prompt": row.prompt, "completion": answer, **weight}
    last = max(i for i, message in enumerate(row.messages) if message.role == "assistant")
    asked = [dict(message.template) for message in row.messages[:last]]
    tools = {"tools": [dict(tool) for tool in row.tools]} if row.tools else {}
    # The answers before the last were not sampled: they are context.
    earlier = any(message["role"] == "assistant" for message in asked)
    only_last = {"only_last": True} if earlier else {}
    messages = [*asked, {"role": "assistant", "content": answer}]
    return {"messages": messages, **tools, **only_last, **weight}
