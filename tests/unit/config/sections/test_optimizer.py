"""Settings of optimizer and schedule that make no sense are refused in one message."""

from __future__ import annotations

import pytest

from torchprime.config.compose import compose_config
from torchprime.errors import ConfigError

BASE = ["model.pretrained_model=x", "task.max_steps=10"]
OPT, LR = "task.optimizer.", "task.lr_scheduler."


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ([f"{OPT}momentum=0.9"], [f"{OPT}momentum: given 0.9", "adamw has no such", "muon, sgd"]),
        (
            [f"{OPT}name=lion", f"{OPT}nesterov=true"],
            [f"{OPT}nesterov: given true", "since lion"],
        ),
        ([f"{OPT}name=sgd", f"{OPT}eps=1e-8"], [f"{OPT}eps: given 1e-08", "null, since sgd"]),
        ([f"{OPT}name=sgd", f"{OPT}momentum=1.0"], [f"{OPT}momentum: given 1.0", "less than 1"]),
        (
            [f"{OPT}name=sgd", f"{OPT}momentum=0", f"{OPT}nesterov=true"],
            [f"{OPT}nesterov: given true", "since task.optimizer.momentum is 0"],
        ),
        ([f"{OPT}muon.steps=3"], [f"{OPT}muon.steps: given 3, expected 5", "name is adamw"]),
        (
            [f"{OPT}name=muon", f"{OPT}muon.steps=0"],
            [f"{OPT}muon.steps: given 0, expected"],
        ),
        (
            [f"{OPT}groups=[{{pattern: model.norm, frozen: true, lr_factor: 0.5}}]"],
            ["groups (pattern 'model.norm').frozen: given true", "has an lr_factor"],
        ),
        (
            [f"{OPT}groups=[{{pattern: a, frozen: true}}, {{pattern: a}}]"],
            [f"{OPT}groups[1].pattern: given 'a'", "the first group"],
        ),
        ([f"{LR}name=wsd"], [f"{LR}decay_steps and {LR}decay_ratio: given null and null"]),
        (
            [f"{LR}name=wsd", f"{LR}decay_steps=2", f"{LR}decay_ratio=0.1"],
            ["given 2 and 0.1, expected at most one"],
        ),
        ([f"{LR}decay_ratio=0.1"], [f"{LR}decay_ratio: given 0.1", "name is linear", "name=wsd"]),
        ([f"{LR}name=cosine", f"{LR}cycles=2"], [f"{LR}cycles: given 2", "cosine_with_restarts"]),
        (
            [f"{LR}name=cosine_with_restarts", f"{LR}cycles=0"],
            [f"{LR}cycles: given 0"],
        ),
    ],
)
def test_it_is_refused(given: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        compose_config([*BASE, *given])
    assert all(part in str(caught.value) for part in said), str(caught.value)
