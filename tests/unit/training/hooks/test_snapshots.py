"""Snapshots combine what the hooks know: metrics, scores and the state that a resume restores."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from torchprime.evaluation.selection import Evaluated
from torchprime.training.hooks import snapshots as module
from torchprime.training.hooks.evaluation import EvaluationHook
from torchprime.training.hooks.metrics import MetricsHook
from torchprime.training.hooks.snapshots import Snapshots
from torchprime.training.prepare import Prepared

HISTORY = [Evaluated(0, {"eval_loss": 3.0}), Evaluated(4, {"eval_loss": 2.0, "accuracy": 0.5})]
PREPARED = cast(
    Prepared,
    SimpleNamespace(
        exporter="exporter", config=SimpleNamespace(checkpoint=SimpleNamespace(hf=True))
    ),
)


@dataclass(frozen=True)
class Facts:
    """Stands for the manifest."""

    step: int
    metrics: dict[str, float]
    hooks: dict[str, Any]
    scores: dict[str, float] = field(default_factory=dict)


@pytest.fixture(autouse=True)
def manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(prepared: Prepared, step: int, **given: Any) -> Facts:
        assert prepared is PREPARED
        return Facts(step, **given)

    monkeypatch.setattr(module, "make_manifest", make)


def source(*, loss_step: int | None = 4, evaluated: bool = True) -> Snapshots:
    """Return the source; `loss_step` is the step of the last record."""
    last = None if loss_step is None else SimpleNamespace(loss=1.5, step=loss_step)
    hook = SimpleNamespace(
        history=HISTORY,
        scores_after=lambda step: HISTORY[-1].scores if step == HISTORY[-1].step else {},
        remembered=lambda: {"evaluation": "state"},
    )
    metrics = cast(MetricsHook, SimpleNamespace(last=last, writers=["writer"]))
    return Snapshots(PREPARED, metrics, cast(EvaluationHook, hook) if evaluated else None)


def test_a_snapshot_has_the_scores_of_exactly_its_step() -> None:
    found = source().take(4)
    assert cast(Any, found.manifest).scores == {
        "eval_loss": 2.0,
        "accuracy": 0.5,
        "base eval_loss": 3.0,  # for gates, from the first evaluation
    }
    assert found.writers == ["writer"]
    assert cast(Any, source().take(5).manifest).scores == {}


def test_the_metrics_name_the_step_of_an_older_loss() -> None:
    assert cast(Any, source().take(4).manifest).metrics == {
        "train loss of the last step": 1.5,
        "held-out loss before": 3.0,
        "held-out loss after": 2.0,
        "accuracy": 0.5,
    }
    assert cast(Any, source().take(6).manifest).metrics == {
        "train loss of step 4": 1.5,
        "held-out loss before": 3.0,
        "held-out loss of step 4": 2.0,
    }


def test_right_after_a_resume_there_is_no_record() -> None:
    assert cast(Any, source(loss_step=None).take(4).manifest).metrics == {}


def test_a_late_snapshot_has_neither_scores_nor_writers() -> None:
    found = source().take_late(4)
    assert cast(Any, found.manifest).scores == {} and not found.writers
    assert cast(Any, found.manifest).hooks == {"evaluation": "state"}


def test_a_run_without_held_out_rows_has_no_scores_and_no_state() -> None:
    found = source(evaluated=False)
    assert list(found.history) == [] and found.scores(4) == {}
    facts = cast(Any, found.take(4).manifest)
    assert facts.hooks == {} and facts.metrics == {"train loss of the last step": 1.5}
