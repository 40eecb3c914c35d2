"""Checkpoint selection, early stopping and the detection of overfitting.

    scores of a step  ->  gates (must all hold)  ->  ranking (metrics in turn)  ->  a rank

All three use the same input: the scores measured after each step, in order. They keep no state
of their own, so a resumed run decides as the uninterrupted one would. A gate may compare with the
run's first evaluation; `with_base` adds its scores to those of a step, so that a checkpoint is
ranked by what its own manifest holds.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torchprime.config.checks import refuse
from torchprime.config.load import nearest
from torchprime.config.sections.evaluation import LOSSES, source_loss
from torchprime.metrics.record import GradedScore

RELATIONS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}
METRIC = r"\s*(\w+(?:\[[^][]+\])?)"  # a source's loss has the source in brackets
GATE = re.compile(METRIC + r"\s*(>=|<=|>|<)\s*(?:(base)\s*(?:([-+*])\s*(\S+))?|(\S+))\s*")
ORDER = re.compile(METRIC + r"\s+(asc|desc)\s*")

Rank = tuple[float, ...]  # lower is better
Scores = Mapping[str, float]


@dataclass(frozen=True)
class Evaluated:
    """The scores measured after a step, and the mean training loss since the previous evaluation.

    Attributes:
        graded: of the scores that graders gave, count and interval too.
    """

    step: int
    scores: dict[str, float] = field(default_factory=dict)
    train_loss: float | None = None
    graded: dict[str, GradedScore] = field(default_factory=dict)

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> Evaluated:
        """Make it from an evaluation's record in metrics.jsonl."""
        graded = record.get("scores") or {}
        scores = {name: record[name] for name in LOSSES}
        scores |= {name: score["value"] for name, score in graded.items()}
        losses = record.get("source_losses") or {}
        scores |= {source_loss(name): loss for name, loss in losses.items() if loss is not None}
        return cls(record["step"], scores, record.get("train_loss"), graded)


def with_base(scores: Scores, base: Scores) -> dict[str, float]:
    """Return a step's scores together with those of the run's first evaluation."""
    return {**scores, **{_base_key(name): value for name, value in base.items()}}


def _base_key(metric: str) -> str:
    return f"base {metric}"  # no metric's own name has a space before its bracket


class Gate(NamedTuple):
    """A condition that a step has to meet.

    Attributes:
        of_base: None if `bound` is the limit; "+" or "*" if it is added to, or multiplies, the
            metric's value at the run's first evaluation.
    """

    metric: str
    relation: str
    bound: float
    of_base: str | None = None

    def limit(self, scores: Scores) -> float:
        """Return the number to compare with; NaN if the base's value is not among the scores."""
        if self.of_base is None:
            return self.bound
        base = scores.get(_base_key(self.metric), math.nan)
        return base + self.bound if self.of_base == "+" else base * self.bound

    def holds(self, scores: Scores) -> bool:
        """Return True if the metric was measured and meets the condition; NaN never does."""
        value = scores.get(self.metric, math.nan)
        return RELATIONS[self.relation](value, self.limit(scores))

    def told(self, scores: Scores) -> str:
        """Return the condition, and its limit as a number if that depends on the base."""
        return str(self) + (f" = {self.limit(scores):.4g}" if self.of_base is not None else "")

    def __str__(self) -> str:
        told = f"{self.bound:g}"
        if self.of_base == "*":
            told = f"base * {told}"
        elif self.of_base == "+":
            sign = "-" if self.bound < 0 else "+"
            told = f"base {sign} {abs(self.bound):g}" if self.bound else "base"
        return f"{self.metric} {self.relation} {told}"


class Order(NamedTuple):
    """A metric, and the direction in which it is better."""

    metric: str
    descending: bool

    def __str__(self) -> str:
        return f"{self.metric} {'desc' if self.descending else 'asc'}"


@dataclass(frozen=True)
class Rule:
    """The gates, and the ranking of the steps that pass them."""

    gates: tuple[Gate, ...] = ()
    ranking: tuple[Order, ...] = (Order("eval_loss", False),)

    def rank(self, scores: Scores) -> Rank | None:
        """Return a step's rank for comparison; None if it is no candidate: a gate fails, or a
        metric of the ranking was not measured or is not finite."""
        if self.failed(scores):
            return None
        values = [scores.get(order.metric, math.nan) for order in self.ranking]
        if not all(map(math.isfinite, values)):
            return None
        pairs = zip(values, self.ranking, strict=True)
        return tuple(-value if order.descending else value for value, order in pairs)

    def failed(self, scores: Scores) -> list[Gate]:
        """Return the gates that these scores do not pass."""
        return [gate for gate in self.gates if not gate.holds(scores)]

    def failed_at_end(self, history: Sequence[Evaluated]) -> str:
        """Return the gates that the last of these evaluations does not pass; "" for none."""
        scores = with_base(history[-1].scores, history[0].scores)
        return ", ".join(gate.told(scores) for gate in self.failed(scores))

    def best(self, history: Sequence[Evaluated]) -> int | None:
        """Return the step that ranks first, the earliest of equal ones; None if none is a
        candidate. The base model, step 0, is no candidate."""
        base = history[0].scores if history else {}
        ranks = ((self.rank(with_base(one.scores, base)), one.step) for one in history if one.step)
        return min(((rank, step) for rank, step in ranks if rank is not None), default=(0, None))[1]

    def gate_rows(self, history: Sequence[Evaluated]) -> list[list[str]]:
        """Return a row for each gate: the condition with its limit, the number of evaluated steps
        that pass it, and the steps that fail it. The base model does not count."""
        rows = []
        for gate in self.gates:
            steps = {one.step: with_base(one.scores, history[0].scores) for one in history}
            passed = {step: gate.holds(scores) for step, scores in steps.items() if step}
            failing = [f"{step:,}" for step, holds in passed.items() if not holds]
            told = gate.told(with_base({}, history[0].scores if history else {}))
            rows.append([told, f"{sum(passed.values())} of {len(passed)}", ", ".join(failing)])
        return rows

    def __str__(self) -> str:
        ranked = ", then ".join(map(str, self.ranking))
        return " and ".join(map(str, self.gates)) + ("; " if self.gates else "") + ranked


def parse_rule(gates: Sequence[str], ranking: Sequence[str], known: Collection[str]) -> Rule:
    """Make a rule from the config's texts.

    Args:
        known: the metrics that the run measures.

    Raises:
        ConfigError: not a condition or an order, or a metric that nothing measures.
    """
    parsed_gates = []
    for place, text in enumerate(gates):
        key = f"selection.gates[{place}]"
        gate = _parse_gate(text)
        if gate is None:
            refuse(
                key,
                text,
                "a metric, one of >=, <=, >, < and a number, base, or base + - * a number",
                'Write "format_pass >= 0.98" or "eval_loss[general] <= base + 0.05", for example.',
            )
        known_metric(gate.metric, known, key)
        parsed_gates.append(gate)
    orders = []
    for place, text in enumerate(ranking):
        key = f"selection.ranking[{place}]"
        match = ORDER.fullmatch(text)
        if match is None:
            refuse(
                key,
                text,
                "a metric and asc (lower is better) or desc",
                'Write "eval_loss asc", for example.',
            )
        orders.append(Order(known_metric(match[1], known, key), match[2] == "desc"))
    return Rule(tuple(parsed_gates), tuple(orders))


def _parse_gate(text: str) -> Gate | None:
    """Return the gate that a text describes; None if it is no condition."""
    match = GATE.fullmatch(text)
    if match is None:
        return None
    metric, relation, base, sign, change, number = match.groups()
    if base is None:
        bound = _number(number)
        return None if bound is None else Gate(metric, relation, bound)
    bound = 0.0 if change is None else _number(change)
    if bound is None:
        return None
    return Gate(metric, relation, -bound if sign == "-" else bound, "*" if sign == "*" else "+")


def known_metric(name: str, known: Collection[str], key: str) -> str:
    """Return the name itself, if the run measures it.

    Raises:
        ConfigError: it does not.
    """
    if name not in known:
        close = nearest(name, known)
        other = "Or add a grader of that name to eval.graders."
        if name.endswith("]"):
            other = "Or name that source in eval.sources."
        refuse(
            key,
            name,
            f"a metric that this run measures: {', '.join(known)}",
            (f"Did you mean {close}? " if close else "") + other,
        )
    return name


def _number(text: str) -> float | None:
    try:
        return number if math.isfinite(number := float(text)) else None
    except ValueError:
        return None


@dataclass(frozen=True)
class EarlyStopping:
    """Early stopping on one metric, with patience."""

    metric: str
    highest: bool  # True if higher is better
    patience: int
    min_delta: float

    def reason(self, history: Sequence[Evaluated]) -> str | None:
        """Return the reason to stop after the last of these evaluations; None to continue.

        The evaluation before the first step does not count: a chance result of the base model
        should not end its training.
        """
        sign = -1.0 if self.highest else 1.0
        best, since = math.inf, 0
        best_at: Evaluated | None = None
        for one in history:
            value = one.scores.get(self.metric)
            if one.step == 0 or value is None:
                continue
            if sign * value < best - (self.min_delta if best_at else 0.0):
                best, best_at, since = sign * value, one, 0
            else:
                since += 1
        if since < self.patience:
            return None
        told = "none was finite"
        if best_at is not None:
            told = f"the best was {best_at.scores[self.metric]:.4g} after step {best_at.step}"
        return (
            f"{self.metric} has not improved by more than {self.min_delta:g} in {since} "
            f"evaluations; {told}"
        )


def overfitting(history: Sequence[Evaluated]) -> str | None:
    """Return the signs of overfitting at the last of these evaluations; None without any.

    The signs are: the held-out loss has risen at the last two evaluations in a row, while the
    training loss has fallen at both.
    """
    if len(history) < 3:
        return None
    low, middle, last = history[-3:]
    held = [one.scores.get("eval_loss", math.nan) for one in (low, middle, last)]
    trained = [one.train_loss for one in (low, middle, last)]
    first, second, third = (math.nan if loss is None else loss for loss in trained)
    if not (held[0] < held[1] < held[2] and first > second > third):
        return None
    return (
        f"overfitting: from step {low.step} to {last.step} the held-out loss rose from "
        f"{held[0]:.4f} over {held[1]:.4f} to {held[2]:.4f}, while the training loss fell from "
        f"{first:.4f} over {second:.4f} to {third:.4f}"
    )
