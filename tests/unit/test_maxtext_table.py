"""The table of docs/maxtext.md: its lines are those of the results."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from load_script import load_script

SCRIPT = Path(__file__).resolve().parents[2] / "experimental" / "tpu_report" / "maxtext.py"


@pytest.fixture(scope="module")
def maxtext():
    return load_script(SCRIPT)


def test_the_page_has_the_results_and_no_others(maxtext) -> None:
    results = json.loads(maxtext.RESULTS.read_text())
    page = maxtext.PAGE.read_text()
    shown = page.split(maxtext.BEGIN)[1].split(maxtext.END)[0].strip()
    assert shown == maxtext.table(results)
    assert set(results) <= set(maxtext.keys())


def test_a_step_that_does_not_fit_has_no_figures(maxtext) -> None:
    row = maxtext.row("8b-8192/recipe", {"error": "RESOURCE_EXHAUSTED", "fits": False})
    assert row.startswith("| Llama 3.1 8B, 8 x 8192, v6e-8 | MaxText, its 8B recipe | does not fit")
    assert row.count("|") == len(maxtext.HEADS) + 1
