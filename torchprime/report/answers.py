"""Answers of several steps to the same held-out rows, side by side, the most informative ones
first.

Rows are sorted by the change of one grade, the one that the run ranked its steps by: wrong answers
that became right, right ones that became wrong, and unchanged ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torchprime.evaluation.behaviour import Grades, read_samples
from torchprime.evaluation.graders.samples import Sample

BETTER, WORSE, STILL_WRONG, STILL_RIGHT = "now right", "now wrong", "still wrong", "still right"
HIGHER, LOWER, SAME, UNGRADED = "better", "worse", "as before", "not graded"
# The most that are shown of each, in this order; more of the first ones if there are few.
SHOWN = {BETTER: 4, HIGHER: 4, WORSE: 4, LOWER: 4, STILL_WRONG: 2, STILL_RIGHT: 2, SAME: 2}
SHOWN_AT_LEAST = 6
LONGEST = 4000  # characters of a prompt or an answer


@dataclass(frozen=True)
class AskedRow:
    """A held-out row and the answer of each compared step, by the table's headings."""

    row_id: str
    prompt: str
    reference: str
    change: str
    answers: dict[str, tuple[Sample, Grades]]


@dataclass(frozen=True)
class Answers:
    """The rows that are shown.

    Attributes:
        by: the grader that decided which; None if none was there.
        counts: how many rows each change has, of all that were answered.
    """

    by: str | None
    counts: dict[str, int]
    rows: list[AskedRow]


def read_answers(
    files: Mapping[str, Path], ranked: Sequence[str], lower: Collection[str]
) -> Answers:
    """Choose rows from the samples of the compared steps.

    Args:
        files: by heading, the earliest first; the last one is compared with the first.
        ranked: the metrics of the run's ranking, in its order.
        lower: the graders for which lower is better.

    Raises:
        DataError: a file that is no run's samples.
    """
    read = {heading: read_samples(path) for heading, path in files.items()}
    by_row = {
        heading: {sample.row_id: (sample, grades) for sample, grades in found}
        for heading, found in read.items()
    }
    first, last = list(by_row)[0], list(by_row)[-1]
    common = [row_id for row_id in by_row[last] if all(row_id in each for each in by_row.values())]
    grades = [by_row[last][row_id][1] for row_id in common]
    by = _deciding(grades, ranked)
    binary = by is not None and _is_binary(
        [by_row[heading][row_id][1].get(by) for heading in (first, last) for row_id in common]
    )
    rows = []
    for row_id in common:
        sample = by_row[last][row_id][0]
        change = UNGRADED
        if by is not None and first != last:
            before, after = (by_row[heading][row_id][1].get(by) for heading in (first, last))
            change = _change(before, after, binary, by not in lower)
        answers = {heading: each[row_id] for heading, each in by_row.items()}
        rows.append(AskedRow(row_id, sample.prompt, sample.reference, change, answers))
    counts = Counter(row.change for row in rows)
    ordered = {change: counts[change] for change in (*SHOWN, UNGRADED) if counts[change]}
    return Answers(by, ordered, _telling(rows))


def _deciding(grades: Sequence[Grades], ranked: Sequence[str]) -> str | None:
    """Return the first grader of the ranking, else the first that passes or fails, else any."""
    names = list(grades[0]) if grades else []
    passes = [name for name in names if _is_binary([each.get(name) for each in grades])]
    return next(chain((name for name in ranked if name in names), passes, names), None)


def _is_binary(values: Sequence[float | None]) -> bool:
    return all(value in (None, 0, 1) for value in values)


def _change(before: float | None, after: float | None, binary: bool, highest: bool) -> str:
    if before is None or after is None:
        return UNGRADED
    if binary:
        right = int(highest)  # 0 if lower is better, as for refusals
        return {
            (False, True): BETTER,
            (True, False): WORSE,
            (False, False): STILL_WRONG,
            (True, True): STILL_RIGHT,
        }[before == right, after == right]
    if before == after:
        return SAME
    return HIGHER if (after > before) == highest else LOWER


def _telling(rows: Sequence[AskedRow]) -> list[AskedRow]:
    shown: list[AskedRow] = []
    for change, most in SHOWN.items():
        shown += [row for row in rows if row.change == change][:most]
    more = [row for row in rows if row not in shown]
    return shown + more[: max(0, SHOWN_AT_LEAST - len(shown))]


def shorten(text: str) -> str:
    """Return a long text's beginning, and the number of characters left out."""
    if len(text) <= LONGEST:
        return text
    return f"{text[:LONGEST]} ... ({len(text) - LONGEST:,} more characters)"


def grade(value: float | None) -> str:
    """Return a grade in a few characters."""
    return "-" if value is None else f"{value:.4g}"
