"""Runs that differ in their seed only, taken together.

A ranking of single runs rewards luck where several seeds were run. Here the same rule ranks the
means over the seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from torchprime.evaluation.intervals import score
from torchprime.evaluation.selection import Rank
from torchprime.sweep.rows import Measured, Row, Table

SEED = "seed"


@dataclass(frozen=True)
class OverSeeds:
    """A metric over several seeds.

    Attributes:
        lowest, highest: of the runs.
        low, high: 95% interval of all answers together; None for a metric that is no share.
    """

    mean: float
    lowest: float
    highest: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Group:
    """The finished runs with the same values, but for the seed.

    Attributes:
        rank: of the means over the seeds, by the runs' rule; None if they do not qualify.
        varied: without the seed.
    """

    rank: int | None
    varied: dict[str, str]
    runs: list[str]
    metrics: dict[str, OverSeeds]


def groups_of(found: Table) -> list[Group]:
    """Return the groups of a sweep over seeds and something else, the best first; none for another
    sweep."""
    by_values: dict[tuple[tuple[str, str], ...], list[Row]] = {}
    for row in found.rows:
        if row.state == "finished" and SEED in row.varied and row.metrics:
            values = tuple((key, value) for key, value in row.varied.items() if key != SEED)
            by_values.setdefault(values, []).append(row)
    if len(by_values) < 2 or max(map(len, by_values.values())) < 2:
        return []
    groups, ranks = [], []
    for values, rows in by_values.items():
        groups.append(Group(None, dict(values), [row.run for row in rows], _metrics(rows)))
        ranks.append(_rank(found, rows))
    known = [rank for rank in ranks if rank is not None]
    placed = [
        group if rank is None else replace(group, rank=1 + sum(other < rank for other in known))
        for group, rank in zip(groups, ranks, strict=True)
    ]
    return sorted(placed, key=lambda group: (group.rank is None, group.rank or 0))


def _metrics(rows: Sequence[Row]) -> dict[str, OverSeeds]:
    """Return the metrics that all of these runs have."""
    measured = [row.metrics or {} for row in rows]
    return {
        name: over_seeds([each[name] for each in measured])
        for name in measured[0]
        if all(name in each for each in measured)
    }


def over_seeds(measured: Sequence[Measured]) -> OverSeeds:
    """Return a metric over several runs. Shares of answers get Wilson's interval of all answers
    together; the seeds ask the same questions, so it is too narrow where these are few."""
    values = [each.value for each in measured]
    found = OverSeeds(fmean(values), min(values), max(values))
    passed = [None if m.count is None else m.value * m.count for m in measured]
    if any(p is None or abs(p - round(p)) > 1e-6 for p in passed):
        return found
    right, asked = sum(round(p or 0) for p in passed), sum(m.count or 0 for m in measured)
    pooled = score([1.0] * right + [0.0] * (asked - right))
    if pooled is None or pooled.value > 1:
        return found
    return replace(found, low=pooled.low, high=pooled.high)


def _rank(found: Table, rows: Sequence[Row]) -> Rank | None:
    """Return the rank of the means of the runs' best scores."""
    if found.rule is None or any(row.best_step is None for row in rows):
        return None
    scores = [found.reports[row.run].best_scores for row in rows]
    names = set.intersection(*(set(each) for each in scores))
    return found.rule.rank({name: fmean(each[name] for each in scores) for name in names})
