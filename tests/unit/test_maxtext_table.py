"""The table of docs/maxtext.md: its lines are those of the results."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "experimental" / "tpu_report"


@pytest.fixture(scope="module")
def maxtext():
    sys.path.insert(0, str(SCRIPTS))
    try:
        return import_module("maxtext")
    finally:
        sys.path.remove(str(SCRIPTS))


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
