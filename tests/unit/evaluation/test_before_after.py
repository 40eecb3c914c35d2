"""The table of base, last and best step."""

from __future__ import annotations

import pytest

from torchprime.evaluation.before_after import columns, table, table_lines
from torchprime.evaluation.selection import Evaluated


def at(step: int, loss: float = 1.0, **scores: float) -> Evaluated:
    return Evaluated(step, {"eval_loss": loss, **scores})


@pytest.mark.parametrize(
    ("steps", "best", "headings"),
    [
        ([0], None, ["base"]),
        ([0, 4, 8], 4, ["base", "last (step 8)", "best (step 4)"]),
        ([0, 4, 8], 8, ["base", "last = best (step 8)"]),
        ([0, 4, 8], None, ["base", "last (step 8)"]),
        ([0, 4], 0, ["base", "last (step 4)", "best (step 0)"]),
        ([2, 4], 4, ["start (step 2)", "last = best (step 4)"]),
        ([4], 4, ["last = best (step 4)"]),
    ],
)
def test_columns_name_what_they_compare(
    steps: list[int], best: int | None, headings: list[str]
) -> None:
    assert list(columns([at(step) for step in steps], best)) == headings


def test_a_metric_that_a_step_lacks_is_a_dash() -> None:
    headings, rows = table([at(0, 3.25), at(4, 1234.5, accuracy=0.5)], 4)
    assert headings == ["", "base", "last = best (step 4)"]
    assert rows == [["eval_loss", "3.2500", "1,234.5000"], ["accuracy", "-", "0.5000"]]


def test_lines_are_aligned() -> None:
    lines = table_lines([at(0, 3.25), at(4, 1.5)], 4)
    assert lines == ["           base    last = best (step 4)", "eval_loss  3.2500  1.5000"]
