"""The graders for which lower is better, according to a run's own rules."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torchprime.evaluation.graders.make import LOWER_IS_BETTER
from torchprime.evaluation.selection import EarlyStopping, Rule


def lower_is_better(
    kinds: Mapping[str, str], rule: Rule, stopping: EarlyStopping | None
) -> list[str]:
    """Return the names of the graders for which lower is better.

    The first of these that names a grader decides: the ranking, early stopping, the gates (unless
    they bound it on both sides), the grader's kind.

    Args:
        kinds: of the graders, by name.
    """
    higher: dict[str, bool] = {}
    for name, direction in _told(rule, stopping):
        higher.setdefault(name, direction)
    return [
        name for name, kind in kinds.items() if not higher.get(name, kind not in LOWER_IS_BETTER)
    ]


def _told(rule: Rule, stopping: EarlyStopping | None) -> Iterator[tuple[str, bool]]:
    """Yield metrics and the directions that the run's rules give them, in the rules' order."""
    yield from ((order.metric, order.descending) for order in rule.ranking)
    if stopping is not None:
        yield stopping.metric, stopping.highest
    bounds = {(gate.metric, gate.relation.startswith(">")) for gate in rule.gates}
    yield from ((metric, above) for metric, above in bounds if (metric, not above) not in bounds)
