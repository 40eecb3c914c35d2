"""The studies' script: nested subsets, points over seeds, sections of a page."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from load_script import load_script

from torchprime.sweep.rows import Measured, Row

SCRIPT = Path(__file__).resolve().parents[2] / "experimental" / "studies" / "run.py"
FILE = "dataset.file_dataset_path"


@pytest.fixture(scope="module")
def script() -> Any:
    return load_script(SCRIPT)


def test_a_smaller_subset_is_a_part_of_each_larger_one(script: Any, tmp_path: Path) -> None:
    rows = tmp_path / "all.jsonl"
    rows.write_text("".join(f"{n}\n" for n in range(10)))
    case = SimpleNamespace(overrides=[f"{FILE}={rows}"])
    study = script.Study("rows", "stories", case, tmp_path, 3, [])
    names = script.write_subsets(study, [2, 5, 99])
    assert names == ["rows_2.jsonl", "rows_5.jsonl", "rows_10.jsonl"]
    two, five, ten = ((tmp_path / name).read_text().split() for name in names)
    assert two == five[:2] and five == ten[:5] and sorted(ten, key=int) == rows.read_text().split()
    assert study.seeds_override == "seed=1,2,3"


def test_points_are_over_the_seeds_and_in_order(script: Any) -> None:
    def row(size: int, seed: int, right: float) -> Row:
        metrics = {"answer_accuracy": Measured(right, 0, 1, 10), "eval_loss": Measured(1 - right)}
        varied = {FILE: f"rows_{size}.jsonl", "seed": str(seed)}
        return Row(f"{size},{seed}", "", "finished", 1, "", varied, "all weights", metrics=metrics,
                   supervised_tokens=100 * size)  # fmt: skip

    rows = [row(16, 1, 0.2), row(2, 1, 0.1), row(16, 2, 0.4), row(2, 2, 0.1)]
    small, large = script.points_of(rows, FILE)
    assert (small.x, large.x, large.seeds, large.tokens) == (2, 16, 2, 1600)
    assert large.right.mean == pytest.approx(0.3) and small.right.low > 0
    assert (large.loss.lowest, large.loss.highest) == (pytest.approx(0.6), pytest.approx(0.8))
    study = SimpleNamespace(kind="rows")
    lines = script.table(study, [small, large])
    assert lines[3].startswith("| all weights | 16 | 30.0% | ") and len(lines) == 4


def test_a_section_is_replaced_and_others_stay(script: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for title, line in (("One", "1"), ("Two", "2"), ("Three", "3"), ("Two", "new")):
        script.write_section(page, title, [line])
    text = page.read_text()
    assert text.endswith("## One\n\n1\n\n## Two\n\nnew\n\n## Three\n\n3\n")
