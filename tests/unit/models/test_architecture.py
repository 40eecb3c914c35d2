"""Reading config.json: both spellings of rope, and refusing what would be computed wrongly."""

from __future__ import annotations

import json

import pytest
from transformers import LlamaConfig

from torchprime.errors import CheckpointError
from torchprime.models.architecture import Rope, architecture_from_hf

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SCALING = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_rope_in_the_spellings_of_transformers_4_and_5() -> None:
    wanted = Rope(5e5, "llama3", 32.0, 1.0, 4.0, 8192)
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **SCALING}}
    older = {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **SCALING}}
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "llama3", **SCALING}}
    for spelling in (old, older, new, {**old, **new}):
        assert architecture_from_hf({**LLAMA, **spelling}).rope == wanted


def test_what_transformers_5_writes_is_read(tmp_path) -> None:
    LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 123.0}).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert architecture_from_hf(config).rope.theta == 123.0


def test_two_spellings_that_disagree_are_refused() -> None:
    with pytest.raises(CheckpointError, match="rope_theta=10000.0 but .* say 500000.0"):
        architecture_from_hf(
            {**LLAMA, "rope_theta": 5e5, "rope_parameters": {"rope_theta": 10000.0}}
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported are llama"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope type 'yarn'"),
        ({"rope_scaling": {"rope_type": "linear"}}, "needs the key factor"),
        ({"vocab_size": None}, "the keys vocab_size are missing"),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1"),
        ({"quantization_config": {"bits": 4}}, "is quantized"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        architecture_from_hf({**LLAMA, **change})


def test_a_window_that_alternates_is_refused() -> None:
    mixed = {
        **LLAMA,
        "model_type": "qwen3",
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    with pytest.raises(CheckpointError, match="alternate"):
        architecture_from_hf(mixed)
