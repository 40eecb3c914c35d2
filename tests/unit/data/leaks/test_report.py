"""A leak report is read back from JSON as it was, and says in one line what it found."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from torchprime.data.leaks.report import Cluster, LeakPair, LeakReport

CLEAN = LeakReport(
    **{"threshold": 0.8, "num_perm": 128, "recall_at_threshold": 0.95},
    **{"train_rows": 7000, "eval_rows": 100, "exact_pairs": 0, "near_pairs": 0},
    **{"leaked_train_rows": 0, "leaked_eval_rows": 0, "num_shared_groups": 0},
    **{"exact_duplicate_rows": 4, "exact_extra_rows": 2, "near_duplicate_rows": 6},
    **{"num_near_clusters": 3, "frequent_shingles": 1, "crowded_rows": 0, "seconds": 1.25},
)
PAIR = LeakPair("t:1", "e:2", 0.9, False, "a", "b")


def test_what_was_written_is_read_back() -> None:
    report = replace(
        CLEAN, pairs=[PAIR], clusters=[Cluster(2, True, ["t:1", "t:3"], "a")], shared_groups=["g"]
    )
    assert LeakReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize(
    ("changes", "leaks"),
    [
        ({}, False),
        ({"leaked_eval_rows": 1}, True),
        ({"num_shared_groups": 1}, True),
        ({"near_duplicate_rows": 50}, False),
    ],
)
def test_only_rows_on_both_sides_are_leaks(changes: dict[str, int], leaks: bool) -> None:
    assert replace(CLEAN, **changes).leaks == leaks


def test_the_summary_names_groups_and_crowds_only_if_there_are_any() -> None:
    assert CLEAN.summary() == (
        "0 of 100 eval rows are in train (0 exact pairs, 0 near pairs at Jaccard >= 0.8, 0 of "
        "7,000 train rows); inside train 4 rows are in exact clusters (2 too many) and 6 in 3 near "
        "clusters; 1.2 s"
    )
    told = replace(CLEAN, num_shared_groups=4, shared_groups=list("abcd"), crowded_rows=5).summary()
    assert "4 groups on both sides (a, b, c)" in told
    assert "5 rows with too many look-alikes to compare all" in told
