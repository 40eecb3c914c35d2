"""The table of experimental/studies/sampled_rows.py, from made-up results."""

from __future__ import annotations

from pathlib import Path

from load_script import load_script

STUDY = Path(__file__).resolve().parents[2] / "experimental" / "studies" / "sampled_rows.py"


def test_a_row_counts_with_its_mean_over_the_seeds() -> None:
    study = load_script(STUDY)
    grades = {
        "start": ({"a": 0.0, "b": 0.0}, {"a": 0.0, "b": 0.0}),
        "all rows": ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}),
        "right answers": ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0}),
        "both": ({"a": 1.0, "b": 0.0}, {"a": 0.0, "b": 0.0}),
    }
    results = [
        study.Result(arm, seed, 10 * seed, right)
        for arm, of_seeds in grades.items()
        for seed, right in enumerate(of_seeds, start=1)
    ]
    assert study.over_seeds(results, "all rows") == {"a": 0.5, "b": 0.0}
    cells = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in study.table(results)[2:]}
    assert cells["right answers"][:3] == ["15", "100.0%", "100.0% to 100.0%"]
    assert cells["right answers"][3] == "+75.0"
    assert cells["both"][3:] == ["+0.0", "+0.0 to +0.0 |"]
