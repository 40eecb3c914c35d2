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
    with_base,
)

GENERAL = "eval_loss[general]"
KNOWN = ("eval_loss", "eval_perplexity", "format_pass", "answer_accuracy", GENERAL)
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
        (["eval_loss <= base / 2"], ["eval_loss asc"], r"selection.gates\[0\].*base \+ - \*"),
        (["eval_loss <= base + nan"], ["eval_loss asc"], r"selection.gates\[0\].*base \+ - \*"),
        (["eval_loss[genera] < 2"], ["eval_loss asc"], r"mean eval_loss\[general\].*eval.sources"),
        (["eval_loss[x] < 2"], ["eval_loss asc"], r"measures: eval_loss, .*name that source in"),
        (["formt_pass > 0"], ["eval_loss asc"], r"selection.gates\[0\].*Did you mean format_pass"),
        ([], ["eval_loss"], r"selection.ranking\[0\]: given 'eval_loss'.*asc .* or desc"),
        ([], ["eval_loss asc", "accuracy desc"], r"selection.ranking\[1\].*eval.graders"),
    ],
)
def test_a_rule_that_is_none_is_refused(gates: list, ranking: list, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_rule(gates, ranking, KNOWN)


@pytest.mark.parametrize(
    ("bound", "limit", "shown"),
    [
        ("base", 1.25, "base"),
        ("base + 0.05", 1.30, "base + 0.05"),
        ("base+5e-2", 1.30, "base + 0.05"),
        ("base - 0.5", 0.75, "base - 0.5"),
        ("base * 1.2", 1.5, "base * 1.2"),
        ("1.4", 1.4, "1.4"),
    ],
)
def test_a_gate_on_a_sources_loss_compares_with_the_base(
    bound: str, limit: float, shown: str
) -> None:
    """A run which forgets more than allowed cannot be the best, however well it does otherwise."""
    rule = parse_rule([f"{GENERAL} <= {bound}"], ["eval_loss asc"], KNOWN)
    assert str(rule.gates[0]) == f"{GENERAL} <= {shown}"
    steps = [
        Evaluated(0, {"eval_loss": 3.0, GENERAL: 1.25}),
        Evaluated(10, {"eval_loss": 2.0, GENERAL: limit - 1e-6}),
        Evaluated(20, {"eval_loss": 1.0, GENERAL: limit + 1e-6}),
        Evaluated(30, {"eval_loss": 0.5}),  # what was not measured does not pass
    ]
    assert rule.best(steps) == 10
    assert rule.best([steps[0], *steps[2:]]) is None
    ((told, passed, failing),) = rule.gate_rows(steps)
    assert (passed, failing) == ("1 of 3", "20, 30")
    assert told == str(rule.gates[0]) + (f" = {limit:.4g}" if "base" in bound else "")
    assert rule.failed_at_end(steps) == told and rule.failed_at_end(steps[:2]) == ""


def test_a_checkpoint_is_ranked_by_its_own_scores_and_the_bases() -> None:
    rule = parse_rule([f"{GENERAL} <= base + 0.1"], ["eval_loss asc"], KNOWN)
    base, step = {"eval_loss": 3.0, GENERAL: 1.0}, {"eval_loss": 2.0, GENERAL: 1.1}
    assert rule.rank(with_base(step, base)) == (2.0,)
    assert rule.rank(with_base(step, {GENERAL: 0.9})) is None
    assert rule.rank(step) is None  # of a version that did not keep the base's
    assert rule.rank(with_base(step, {GENERAL: math.nan})) is None


def test_a_record_has_a_score_for_each_source() -> None:
    record = {"step": 3, "eval_loss": 2.0, "eval_perplexity": 7.4, "train_loss": None}
    losses = {"own": 1.0, "general": 4.0, "empty": None}
    found = Evaluated.of({**record, "source_losses": losses}).scores
    assert found == {
        "eval_loss": 2.0, "eval_perplexity": 7.4, "eval_loss[own]": 1.0, GENERAL: 4.0
    }  # fmt: skip
    assert set(Evaluated.of({**record, "source_losses": None}).scores) == {
        "eval_loss", "eval_perplexity"
    }  # fmt: skip


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
