"""The adapter section: values and combinations that it refuses, by key."""

from __future__ import annotations

import pytest

from torchprime.config.compose import compose_config
from torchprime.config.sections.adapter import AdapterConfig
from torchprime.errors import ConfigError

BASE = ["model.pretrained_model=x/y", "task.max_steps=1"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("adapter.rank=0", "adapter.rank: given 0, expected at least 1"),
        ("adapter.alpha=-1", "adapter.alpha: given -1.0, expected a number above 0"),
        ("adapter.dropout=1", "adapter.dropout: given 1.0, expected a fraction from 0 to less"),
        ("adapter.dropout=-0.1", "adapter.dropout: given -0.1"),
        ("adapter.targets=[]", r"adapter.targets: given \[\], expected at least one"),
        ("adapter.targets=['']", r"adapter.targets\[0\]: given '', expected a name"),
        ("adapter.layers=[]", "Set adapter.layers=null for all layers"),
        ("adapter.layers=[-1]", r"adapter.layers\[0\]: given -1"),
        ("adapter.scaling=half", "adapter.scaling: given 'half'"),
        ("adapter=none adapter.base_dtype=nf4", "adapter=none trains all weights.*adapter=qlora"),
        ("adapter=none export.adapter=both", "export.adapter: given 'both', expected merged"),
        ("task=train model.pretrained_model=null model.tokenizer_name=a model.architecture={a:1}",
         "model.pretrained_model: given null, expected the base of the adapter"),
        ("model.add_special_tokens=[new]", "adapter.modules_to_train: given .*embed_tokens among"),
        ("task.convert_to_safetensors=false", "task.convert_to_safetensors: given false"),
        ("checkpoint.hf=true", "checkpoint.hf: given true, expected false, since a run with"),
    ],
)  # fmt: skip
def test_refused(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose_config([*BASE, "adapter=lora", *overrides.split(" ")])


def test_new_tokens_are_trained_with_the_embedding() -> None:
    more = ["model.add_special_tokens=[new]", "adapter.modules_to_train=[model.embed_tokens]"]
    assert compose_config([*BASE, "adapter=lora", *more]).adapter.trains_whole("embed_tokens")


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("none", {}),
        ("lora", {"rank": 16}),
        ("dora", {"rank": 16, "dora": True}),
        ("qlora", {"rank": 16, "base_dtype": "nf4"}),
    ],
)
def test_options(option: str, expected: dict[str, object]) -> None:
    assert compose_config([*BASE, f"adapter={option}"]).adapter == AdapterConfig(**expected)  # type: ignore[arg-type]


def test_a_folder_to_start_from_needs_no_rank() -> None:
    assert compose_config([*BASE, "adapter.pretrained=some/adapter"]).adapter.enabled
