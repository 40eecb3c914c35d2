"""Frozen and trained parameters after an adapter is applied."""

from __future__ import annotations

import pytest

from torchprime.adapters.apply import apply_adapter, base_name, trainable
from torchprime.adapters.spec import AdapterSpec
from torchprime.errors import ConfigError
from torchprime.models.decoder import CausalLM


def test_only_adapters_and_whole_modules_are_trained(ours: CausalLM) -> None:
    spec = AdapterSpec(rank=2, alpha=2, targets=("q_proj",), modules_to_train=("lm_head",))
    names = apply_adapter(ours, spec)
    expected = [f"{name}.lora_{part}.weight" for name in names for part in "AB"]
    assert list(trainable(ours)) == [*expected, "lm_head.weight"]


def test_the_bases_names_stay(ours: CausalLM) -> None:
    before = {name: p.shape for name, p in ours.named_parameters()}
    apply_adapter(ours, AdapterSpec(rank=2, alpha=2, dora=True))
    after = {base_name(n): p.shape for n, p in ours.named_parameters() if "lora_" not in n}
    assert after == before


def test_a_layer_is_adapted_or_trained_whole(ours: CausalLM) -> None:
    spec = AdapterSpec(rank=2, alpha=2, targets=("q_proj",), modules_to_train=("self_attn",))
    with pytest.raises(ConfigError, match=r"modules_to_train: model.layers.0.self_attn.q_proj is"):
        apply_adapter(ours, spec)
