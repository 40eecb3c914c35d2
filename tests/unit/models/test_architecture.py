"""Reading config.json: both spellings of rope, and refusing what would be computed wrongly."""

from __future__ import annotations

import hashlib
import json

import pytest
from transformers import LlamaConfig

from torchprime.errors import CheckpointError
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.rope_config import Rope

LLAMA = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
MINISTRAL3 = {"model_type": "ministral3", "num_key_value_heads": 2}
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
        assert architecture_from_hf({**LLAMA, **spelling}).ropes == (wanted,)


def test_what_transformers_5_writes_is_read(tmp_path) -> None:
    LlamaConfig(rope_parameters={"rope_type": "default", "rope_theta": 123.0}).save_pretrained(
        tmp_path
    )
    config = json.loads((tmp_path / "config.json").read_text())
    assert architecture_from_hf(config).ropes[0].theta == 123.0


@pytest.mark.parametrize(
    ("new", "old", "key"),
    [
        ({"rope_theta": 1e4}, {"rope_theta": 5e5}, r"rope_theta \(10000.0 and 500000.0\)"),
        ({"rope_type": "default"}, {"rope_scaling": {"type": "linear", "factor": 4}}, "rope_type"),
        ({"rope_theta": 5e4}, {"rope_scaling": {"type": "default"}}, "rope_theta"),
        *(
            (
                {"rope_type": "llama3", **SCALING, key: 2.5 if "freq" in key else 64},
                {"rope_scaling": {"rope_type": "llama3", **SCALING}},
                key,
            )
            for key in SCALING
        ),
    ],
)
def test_two_spellings_that_differ_are_refused_by_name(new: dict, old: dict, key: str) -> None:
    """transformers 5 takes rope_scaling, transformers 4 rope_parameters: two models."""
    architecture_from_hf({**LLAMA, **old})
    architecture_from_hf({**LLAMA, "rope_parameters": new})
    with pytest.raises(CheckpointError, match=f"rope_parameters and .* differ in .*{key}"):
        architecture_from_hf({**LLAMA, **old, "rope_parameters": new})


def test_the_original_context_may_stand_outside_of_the_rope() -> None:
    inside = {key: SCALING[key] for key in SCALING if key != "original_max_position_embeddings"}
    config = {**LLAMA, "rope_scaling": {"type": "llama3", **inside}, "max_position_embeddings": 99}
    assert architecture_from_hf(config).ropes[0].original_max_position == 99
    config["original_max_position_embeddings"] = 32
    assert architecture_from_hf(config).ropes[0].original_max_position == 32
    config["rope_scaling"] = {"type": "llama3", **SCALING}
    with pytest.raises(CheckpointError, match="rope_scaling.original_max_position_embeddings is"):
        architecture_from_hf(config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "model_type is 'gpt2'; supported are llama"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"rope_scaling": {"rope_type": "mrope", "factor": 4.0}}, "rope type 'mrope'"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.factor is missing"),
        (
            {"rope_scaling": {"rope_type": "longrope", "short_factor": [1.0, 1.0, 1.0]}},
            r"rope_scaling.short_factor is \[1.0, 1.0, 1.0\], expected a list of 4 numbers",
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "llama_4_scaling_beta": 0.1}},
            "rope_parameters.llama_4_scaling_beta is 0.1, expected null",
        ),
        (
            {**MINISTRAL3, "rope_parameters": {"rope_type": "yarn", "factor": 2}},
            "rope_parameters.llama_4_scaling_beta is missing, expected a number of at least 0",
        ),
        (
            {"llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 64}},
            "llama_4_scaling is {.*}, expected null, by the rope settings",
        ),
        (
            {
                **MINISTRAL3,
                "rope_parameters": {
                    **{"rope_type": "yarn", "factor": 2, "llama_4_scaling_beta": 0.2},
                    "original_max_position_embeddings": 64,
                },
                "llama_4_scaling": {"beta": 0.1, "original_max_position_embeddings": 64},
            },
            "llama_4_scaling is {.*}, expected {'beta': 0.2, .*: 64}, by the rope settings",
        ),
        (MINISTRAL3, "rope_parameters is missing, expected .* one of the rope types yarn"),
        (
            {"model_type": "llama4", "text_config": {"model_type": "llama4_text"}},
            "model_type is 'llama4'; supported are .* 'llama4_text', neither supported",
        ),
        ({"layer_types": ["chunked_attention"] * 2}, r"layer_types is \['chunked_attention'"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ({"vocab_size": None}, "vocab_size is missing, expected a whole number from 1 to"),
        ({"num_attention_heads": 0}, "num_attention_heads is 0"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_attention_heads": [4]}, r"num_attention_heads is \[4\]"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000, expected .* to 1,024"),
        ({"hidden_size": 33}, "hidden_size=33 is not a multiple of num_attention_heads=4"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings is 'false'"),
        ({"is_causal": False}, "is_causal is False"),
        ({"head_dim": 7}, "head_dim=7"),
        (
            {"model_type": "llava", "text_config": {"model_type": "llama"}},
            "model_type is 'llava'.*Its text part .* is of the type 'llama': save it as",
        ),
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1.*Set it to 0.0 in a copy"),
        ({"quantization_config": {"bits": 4, "quant_method": "gptq"}}, "method='gptq', bits=4"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "is quantized .*bits=4"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1e3}}, "alpha is 1000.0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "short_mscale": 1.2}},
            "rope_scaling.short_mscale is 1.2, expected null",
        ),
        # Keys of other families that change no weight.
        ({"logits_scaling": 8.0}, "logits_scaling is 8.0, expected null or 1: this family does"),
        ({"logit_scale": 0.0625}, "logit_scale is 0.0625"),
        ({"attention_multiplier": 0.01}, "attention_multiplier is 0.01, expected null: this"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256"),
        ({"no_rope_layers": [1, 0]}, r"no_rope_layers is \[1, 0\]"),
        ({"rotary_pct": 0.25}, "rotary_pct is 0.25"),
        ({"rope_interleaved": True}, "rope_interleaved is True, expected null or false"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"clip_qkv": 8.0}, "clip_qkv is 8.0"),
        ({"use_parallel_residual": True}, "use_parallel_residual is True"),
        ({"alibi": True}, "alibi is True"),
        ({"attention_chunk_size": 8192}, "attention_chunk_size is 8192"),
    ],
)
def test_what_cannot_be_computed_is_refused(change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        architecture_from_hf({**LLAMA, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"rope_interleaved": False, "logit_scale": 1, "clip_qkv": None, "use_mrope": False},
        {"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2], "apply": False}},
        {"auto_map": {"AutoModelForCausalLM": "modeling_x.X"}, "pretraining_tp": 4},
        {"quantization_config": {}, "interpolate_factor": 1, "lm_head_bias": False},
    ],
)
def test_keys_that_change_nothing_are_accepted(change: dict) -> None:
    assert architecture_from_hf({**LLAMA, **change}) == architecture_from_hf(LLAMA)


def test_a_family_reads_its_own_keys() -> None:
    granite = {"logits_scaling": 8.0, "attention_multiplier": 0.01}
    assert architecture_from_hf({**LLAMA, "model_type": "granite", **granite}).logits_divisor == 8
    qwen3 = {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 4, "use_qk_norm": True}
    assert architecture_from_hf(qwen3).qk_norm


@pytest.mark.parametrize(
    ("change", "digest"),
    [
        ({"rope_theta": 5e5}, "73e5e6b929bfad98"),
        ({"model_type": "mistral", "sliding_window": 7}, "e038bb606383a745"),
        (
            {
                "model_type": "qwen2",
                "use_sliding_window": True,
                "sliding_window": 4,
                "max_window_layers": 1,
            },
            "5f3ec18fbe794b46",
        ),
    ],
)
def test_a_fingerprint_of_a_run_by_version_0_1_0_stays(change: dict, digest: str) -> None:
    """The hashes were made with that version's fields."""
    config = {**LLAMA, "num_hidden_layers": 3, "num_key_value_heads": 2, **change}
    told = json.dumps(architecture_from_hf(config).described(), sort_keys=True)
    assert hashlib.sha256(told.encode()).hexdigest().startswith(digest)


def test_fewer_and_more_layers() -> None:
    llama = {
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "vocab_size": 9, "hidden_act": "silu", "rms_norm_eps": 1e-5,
    }  # fmt: skip
    two = architecture_from_hf(llama)
    for count in (1, 2, 5):
        assert two.with_layers(count) == architecture_from_hf({**llama, "num_hidden_layers": count})
