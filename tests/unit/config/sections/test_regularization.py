"""The regularization section: values and combinations that it refuses, by key."""

from __future__ import annotations

import pytest

from torchprime.config.compose import compose_config
from torchprime.errors import ConfigError

BASE = ["model.pretrained_model=x/y", "task.max_steps=1"]
SCRATCH = (
    "task=train model.pretrained_model=null model.tokenizer_name=a +model.architecture.a=1 "
    "regularization.{}"
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("regularization.l2_sp.strength=-1", "l2_sp.strength: given -1.0, expected a number above"),
        ("regularization.l2_sp.strength=0", "l2_sp.strength: given 0.0, expected a number above"),
        ("regularization.l2_sp.strength=.inf", "l2_sp.strength: given '.inf'"),
        ("regularization.ewc.strength=-1 regularization.ewc.fisher=f", "ewc.strength: given -1.0"),
        ("regularization.ewc.strength=1", "ewc.fisher: given null, .*torchprime fisher"),
        ("regularization.ewc.fisher=f", "ewc.strength: given null, expected a number above 0"),
        ("regularization.ewc.fisher=gs://b/f regularization.ewc.strength=1", "not a URL"),
        ("regularization.ewc.fisher=f regularization.ewc.strength=1 "
         "regularization.l2_sp.strength=1", "l2_sp.strength: given 1.0, expected null"),
        ("adapter=lora regularization.l2_sp.strength=1",
         "l2_sp.strength: given 1.0, expected null, since the run trains an adapter"),
        ("adapter=lora regularization.ewc.fisher=f regularization.ewc.strength=1",
         "ewc.strength: given 1.0, expected null, since the run trains an adapter"),
        ("regularization.kl.coefficient=-1", "kl.coefficient: given -1.0, expected a number above"),
        ("regularization.kl.on=answers", "kl.on: given 'answers'"),
        ("adapter=lora adapter.modules_to_train=[norm] regularization.kl.coefficient=1",
         "kl.coefficient: given 1.0, expected null, since adapter.modules_to_train"),
        (SCRATCH.format("kl.coefficient=1"), "model.pretrained_model: given null, expected the "
         "base .* regularization.kl.coefficient=null"),
        (SCRATCH.format("l2_sp.strength=1"), "model.pretrained_model: given null, expected the "
         "base .* regularization.l2_sp.strength=null"),
    ],
)  # fmt: skip
def test_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config([*BASE, *overrides.split(" ")])


def test_off_by_default() -> None:
    section = compose_config(BASE).regularization
    assert section.penalty is None and not section.enabled and not section.holds_base(adapter=False)
    assert section.describe() == ""


def test_the_penalty_by_name() -> None:
    section = compose_config([*BASE, "regularization.l2_sp.strength=0.5"]).regularization
    assert section.penalty == ("l2_sp", 0.5)
    assert section.enabled and section.holds_base(adapter=False)
    more = ["regularization.l2_sp.strength=0.5", "regularization.kl.coefficient=0.1"]
    assert compose_config([*BASE, *more]).regularization.describe() == (
        "l2_sp 0.5, kl 0.1 on supervised tokens"
    )


def test_the_divergence_needs_a_copy_of_the_base_unless_there_is_an_adapter() -> None:
    section = compose_config([*BASE, "adapter=lora", "regularization.kl.coefficient=1"])
    assert section.regularization.enabled
    assert section.regularization.runs_base(adapter=False)
    assert not section.regularization.runs_base(adapter=True)
    assert not section.regularization.holds_base(adapter=True)
