from __future__ import annotations

import pytest
import transformers

from torchprime.models.families import FAMILIES


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_are_transformers(name: str) -> None:
    """They apply where config.json leaves a key out."""
    family, config = FAMILIES[name], transformers.AutoConfig.for_model(name)
    assert family.context == config.max_position_embeddings
    assert (family.kv_heads or config.num_attention_heads) == config.num_key_value_heads
    usual = config.hidden_size // config.num_attention_heads
    assert (family.head_dim or usual) == (getattr(config, "head_dim", None) or usual)
    for bias in (family.qkv_bias, family.out_bias, family.mlp_bias):
        assert bias.key is None or getattr(config, bias.key) == bias.default
    key, activation = family.activation
    for name_of, value in {**family.defaults, key: activation}.items():
        assert getattr(config, name_of) == value
    assert hasattr(transformers, family.hf_class)
