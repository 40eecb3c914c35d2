"""Rules, patience and overfitting, against what a person would decide from the same numbers."""

from __future__ import annotations

import math

import pytest

from torchprime.errors import ConfigError
from torchprime.evaluation.selection import (
    EarlyStopping,
    Evaluated,
    Rule,
    overfitting,
    parse_rule,
)

KNOWN = ("eval_loss", "eval_perplexity", "format_pass", "answer_accuracy")
RULE = parse_rule(["format_pass >= 0.98"], ["answer_accuracy desc", "eval_loss asc"], KNOWN)


def scores(form: float, right: float, loss: float) -> dict[str, float]:
    return {"format_pass": form, "answer_accuracy": right, "eval_loss": loss}


def best(rule: Rule, steps: list[dict[str, float]]) -> int | None:
    """The place of the best; the base, before them, would win if it counted."""
    perfect = Evaluated(0, scores(1.0, 1.0, 0.0))
    found = rule.best([perfect, *(Evaluated(i + 1, s) for i, s in enumerate(steps))])
    return None if found is None else found - 1


def test_gates_come_first_then_each_metric_in_turn() -> None:
    steps = [
        scores(0.97, 0.99, 0.1),  # the best answers, but not in form
        scores(0.98, 0.70, 0.3),
        scores(1.00, 0.80, 0.5),
        scores(0.99, 0.80, 0.4),  # the tie is broken by the loss
    ]
    assert best(RULE, steps) == 3
    assert best(RULE, steps[:1]) is None
    assert [str(gate) for gate in RULE.failed(steps[0])] == ["format_pass >= 0.98"]
    assert RULE.failed(steps[1]) == []
    assert best(Rule(), steps) == 0  # by loss alone, as without a selection
    assert best(RULE, [steps[1], steps[3], steps[3]]) == 1  # of equal ones the earlier


@pytest.mark.parametrize("lacking", [{}, {"eval_loss": math.nan}, {"eval_loss": math.inf}])
def test_what_was_not_measured_is_no_candidate(lacking: dict[str, float]) -> None:
    assert Rule().rank(lacking) is None
    assert RULE.rank({**scores(1.0, 1.0, 0.1), **{"format_pass": math.nan}}) is None
    assert RULE.rank({"answer_accuracy": 1.0, "eval_loss": 0.1}) is None


@pytest.mark.parametrize(
    ("relation", "passing", "failing"),
    [(">=", 2.0, 1.9), ("<=", 2.0, 2.1), (">", 2.1, 2.0), ("<", 1.9, 2.0)],
)
def test_relations(relation: str, passing: float, failing: float) -> None:
    rule = parse_rule([f"eval_loss{relation}2e0"], ["eval_loss asc"], KNOWN)
    assert rule.rank({"eval_loss": passing}) is not None
    assert rule.rank({"eval_loss": failing}) is None


@pytest.mark.parametrize(
    ("gates", "ranking", "message"),
    [
        (["format_pass = 0.9"], ["eval_loss asc"], r"selection.gates\[0\]: given 'format_pass = 0"),
        (["format_pass >= much"], ["eval_loss asc"], r"selection.gates\[0\].*and a number"),
        (["formt_pass > 0"], ["eval_loss asc"], r"selection.gates\[0\].*Did you mean format_pass"),
        ([], ["eval_loss"], r"selection.ranking\[0\]: given 'eval_loss'.*asc .* or desc"),
        ([], ["eval_loss asc", "accuracy desc"], r"selection.ranking\[1\].*eval.graders"),
    ],
)
def test_a_rule_that_is_none_is_refused(gates: list, ranking: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rule(gates, ranking, KNOWN)


def history(*losses: float, metric: str = "eval_loss") -> list[Evaluated]:
    return [Evaluated(10 * i, {metric: loss}) for i, loss in enumerate(losses)]


def test_patience_counts_evaluations_without_improvement() -> None:
    stopping = EarlyStopping("eval_loss", highest=False, patience=2, min_delta=0.1)
    losses = [9.0, 2.0, 1.95, 1.5, 1.45, 1.6]  # 1.95 is less than min_delta better than 2.0
    told = [stopping.reason(history(*losses[:count])) for count in range(1, len(losses) + 1)]
    assert [reason is not None for reason in told] == [False] * 5 + [True]
    assert told[-1] == (
        "eval_loss has not improved by more than 0.1 in 2 evaluations; the best was 1.5 after "
        "step 30"
    )


def test_slow_improvement_is_improvement_in_the_end() -> None:
    """Each is compared with the best that counted, so that small gains add up."""
    stopping = EarlyStopping("eval_loss", highest=False, patience=2, min_delta=0.1)
    assert stopping.reason(history(9.0, 2.0, 1.95, 1.89, 1.85, 1.78)) is None


def test_more_can_be_better_and_the_base_does_not_count() -> None:
    stopping = EarlyStopping("right", highest=True, patience=2, min_delta=0.0)
    assert stopping.reason(history(0.9, 0.1, 0.2, 0.3, metric="right")) is None
    assert stopping.reason(history(0.0, 0.3, 0.2, 0.3, metric="right")) is not None
    assert stopping.reason(history(0.0, math.nan, math.nan, metric="right")) == (
        "right has not improved by more than 0 in 2 evaluations; none was finite"
    )


def test_overfitting_is_both_curves_parting_twice() -> None:
    def evaluated(held: list[float], trained: list[float]) -> list[Evaluated]:
        pairs = enumerate(zip(held, trained, strict=True))
        return [Evaluated(10 * i, {"eval_loss": h}, t) for i, (h, t) in pairs]

    assert overfitting(evaluated([2.0, 1.0, 1.1, 1.2], [3.0, 0.9, 0.8, 0.7])) == (
        "overfitting: from step 10 to 30 the held-out loss rose from 1.0000 over 1.1000 to "
        "1.2000, while the training loss fell from 0.9000 over 0.8000 to 0.7000"
    )
    assert overfitting(evaluated([2.0, 1.0, 1.1, 1.05], [3.0, 0.9, 0.8, 0.7])) is None
    assert overfitting(evaluated([2.0, 1.0, 1.1, 1.2], [3.0, 0.9, 0.8, 0.85])) is None
    assert overfitting(evaluated([1.0, 1.1], [0.9, 0.8])) is None
    assert overfitting([*history(1.0, 1.1, 1.2)]) is None  # without training losses
