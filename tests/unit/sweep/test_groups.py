"""Means over seeds, ranked by the runs' rule."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
from scipy.stats import binomtest

from torchprime.evaluation.selection import Gate, Order, Rule
from torchprime.sweep.groups import groups_of, over_seeds
from torchprime.sweep.rows import Measured, Row, Table


def table(losses: dict[tuple[str, str], float], rule: Rule, **of_row: Any) -> Table:
    """A table of finished runs by (rate, seed)."""
    rows, reports = [], {}
    for (rate, seed), loss in losses.items():
        name = f"{rate},{seed}"
        given = {"state": "finished", "best_step": 4, "metrics": {"eval_loss": Measured(loss)}}
        rows.append(Row(name, name, rank=None, message="", varied={"lr": rate, "seed": seed},
                        **{**given, **of_row}))  # fmt: skip
        reports[name] = SimpleNamespace(best_scores={"eval_loss": loss, "base eval_loss": 5.0})
    return Table(rule, rows, [], cast(Any, reports))


# The best single run is of the rate with the worse mean.
LOSSES = {("1", "1"): 1.0, ("1", "2"): 4.0, ("2", "1"): 2.0, ("2", "2"): 2.2}


def test_the_rule_ranks_the_means() -> None:
    groups = groups_of(table(LOSSES, Rule()))
    assert [(group.varied, group.rank) for group in groups] == [({"lr": "2"}, 1), ({"lr": "1"}, 2)]
    assert groups[0].runs == ["2,1", "2,2"]
    best = groups[0].metrics["eval_loss"]
    assert (best.mean, best.lowest, best.highest) == (pytest.approx(2.1), 2.0, 2.2)
    assert (best.low, best.high) == (None, None)
    worst_first = Rule(ranking=(Order("eval_loss", True),))
    assert [group.varied["lr"] for group in groups_of(table(LOSSES, worst_first))] == ["1", "2"]


def test_means_have_to_pass_the_gates() -> None:
    half = Rule(gates=(Gate("eval_loss", "<=", 0.48, "*"),))  # of the base: 2.4
    assert [group.rank for group in groups_of(table(LOSSES, half))] == [1, None]
    assert {g.rank for g in groups_of(table(LOSSES, Rule(), best_step=None))} == {None}


def test_only_several_seeds_of_several_values_are_grouped() -> None:
    assert groups_of(table({("1", "1"): 1.0, ("2", "1"): 2.0}, Rule())) == []
    assert groups_of(table({("1", "1"): 1.0, ("1", "2"): 2.0}, Rule())) == []
    assert groups_of(table(LOSSES, Rule(), state="failed")) == []


def test_shares_are_pooled_and_measures_are_not() -> None:
    pooled = over_seeds([Measured(0.5, 0.2, 0.8, 20), Measured(0.9, 0.7, 0.95, 30)])
    expected = binomtest(37, 50).proportion_ci(0.95, "wilson")
    assert (pooled.low, pooled.high) == pytest.approx((expected.low, expected.high))
    assert (pooled.mean, pooled.lowest, pooled.highest) == (pytest.approx(0.7), 0.5, 0.9)
    measure = over_seeds([Measured(12.345, 11, 13, 7), Measured(13.0, 12, 14, 7)])
    assert measure.low is None
