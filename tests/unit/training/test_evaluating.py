"""The decisions of a run, made from its config: metrics by source in rule and early stopping."""

from __future__ import annotations

import pytest

from torchprime.config.compose import compose_config
from torchprime.errors import ConfigError
from torchprime.evaluation.selection import Evaluated
from torchprime.training.evaluating import make_choosing

SOURCES = (
    "eval.sources=[{name: own, file_dataset_path: a}, {name: general, file_dataset_path: b}]",
    "eval.every_steps=1",
    "model.pretrained_model=x",
    "task.max_steps=9",
)


def general(*losses: float) -> list[Evaluated]:
    return [Evaluated(step, {"eval_loss[general]": loss}) for step, loss in enumerate(losses)]


def test_early_stopping_may_watch_one_source() -> None:
    stops = ("selection.early_stopping.metric='eval_loss[general]'",
             "selection.early_stopping.patience=2")  # fmt: skip
    stopping = make_choosing(compose_config([*SOURCES, *stops])).stopping
    assert stopping is not None and stopping.reason(general(1.0, 1.2, 1.1, 1.15)) is None
    assert "has not improved" in str(stopping.reason(general(1.0, 1.2, 1.1, 1.15, 1.2)))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("early_stopping.metric='eval_loss[genera]'", "early_stopping.metric.*mean eval_loss.gen"),
        ("ranking=['eval_loss[genera] asc']", r"ranking\[0\].*mean eval_loss\[general\]"),
        ("gates=['eval_loss[web] <= base']", r"gates\[0\].*name that source in eval.sources"),
    ],
)
def test_a_source_that_does_not_exist_is_refused(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_choosing(compose_config([*SOURCES, f"selection.{override}"]))
