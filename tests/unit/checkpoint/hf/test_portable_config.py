"""config.json and generation_config.json of an export: all readers take them, and alike."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from torchprime.checkpoint.hf.portable_config import portable_config, portable_generation_config
from torchprime.errors import CheckpointError
from torchprime.models.architecture import architecture_from_hf

LLAMA3 = dict(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)


def test_every_family_reads_as_the_same_architecture_in_old_and_new_spelling(any_family):
    """Both spellings, for 4.57 (rope_scaling) and 5.x (rope_parameters), are the source's."""
    result, _ = portable_config(any_family.config, any_family.spec, torch.bfloat16, 0)
    source = architecture_from_hf(any_family.config)
    old = {k: v for k, v in result.items() if k not in ("rope_parameters", "dtype")}
    new = {
        k: v for k, v in result.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")
    }
    assert architecture_from_hf(old) == architecture_from_hf(new) == source
    theirs = transformers.AutoConfig.for_model(**result)
    original = transformers.AutoConfig.from_pretrained(any_family.folder)
    assert theirs.rope_parameters == original.rope_parameters
    assert theirs.tie_word_embeddings == original.tie_word_embeddings


def test_llama3_rope_in_both_spellings_from_either(tied_llama):
    new = tied_llama.config
    old = {k: v for k, v in new.items() if k != "rope_parameters"}
    old |= {"rope_theta": 500_000.0, "rope_scaling": LLAMA3}
    for source in (new, old):
        result, _ = portable_config(source, tied_llama.spec, torch.bfloat16, 0)
        assert result["rope_theta"] == 500_000.0
        assert result["rope_scaling"] == LLAMA3
        assert result["rope_parameters"] == {**LLAMA3, "rope_theta": 500_000.0}
        assert result["dtype"] == result["torch_dtype"] == "bfloat16"
        assert result["architectures"] == ["LlamaForCausalLM"]
        assert result["tie_word_embeddings"] is True


def test_plain_rope_has_no_scaling(any_family):
    result, _ = portable_config(any_family.config, any_family.spec, torch.float32, 0)
    told = any_family.config["rope_parameters"]
    rope, told = (each.get("full_attention", each) for each in (result["rope_parameters"], told))
    if rope["rope_type"] == "default":
        assert result["rope_scaling"] is None
        assert result["rope_theta"] == told["rope_theta"]


def test_remote_code_does_not_survive(llama):
    source = {**llama.config, "auto_map": {"AutoModelForCausalLM": "evil.Model"}}
    assert "auto_map" not in portable_config(source, llama.spec, torch.float32, 0).content


def test_vocabulary_must_fit_the_embedding(llama):
    with pytest.raises(CheckpointError, match="vocab_size=321, but .* has 320 rows"):
        portable_config({**llama.config, "vocab_size": 321}, llama.spec, torch.float32, 0)


@pytest.mark.parametrize(
    ("source", "config", "eos", "expected"),
    [
        ({"eos_token_id": [1, 2]}, {}, 2, [1, 2]),
        ({"eos_token_id": 1}, {}, 2, [1, 2]),
        ({"eos_token_id": 2}, {}, 2, 2),
        ({}, {"eos_token_id": 5}, 2, [5, 2]),
        (None, {}, 2, 2),
        (None, {"eos_token_id": [2]}, 2, 2),
    ],
)
def test_trained_stop_token_joins_the_others(source, config, eos, expected):
    assert portable_generation_config(source, config, eos).content["eos_token_id"] == expected


def test_generation_settings_are_kept():
    source = {"temperature": 0.6, "do_sample": True, "_from_model_config": True}
    result = portable_generation_config(source, {"bos_token_id": 7, "pad_token_id": None}, 2)
    expected = {"temperature": 0.6, "do_sample": True, "bos_token_id": 7, "eos_token_id": 2}
    assert result == (expected, [])


def test_what_transformers_refuses_is_left_out_and_said(llama):
    """transformers 5 checks types that 4.57 did not; each value here it refuses to load."""
    strange = {
        "pad_token_id": [0, 2],
        "use_cache": None,
        "id2label": "none",
        "architectures": "LlamaForCausalLM",
        "chunk_size_feed_forward": math.nan,
        "return_dict": False,
    }
    source = {**llama.config, **strange}
    for key in ("pad_token_id", "use_cache", "id2label"):
        with pytest.raises((StrictDataclassError, AttributeError)):
            transformers.AutoConfig.for_model(**{**llama.config, key: strange[key]})
    result, repairs = portable_config(source, llama.spec, torch.float32, 0)
    read = transformers.AutoConfig.for_model(**json.loads(json.dumps(result, allow_nan=False)))
    assert read.pad_token_id == result["pad_token_id"] == 0
    assert not {"use_cache", "id2label", "chunk_size_feed_forward", "return_dict"} & result.keys()
    for key in set(strange) - {"architectures"}:
        assert sum(key in line for line in repairs) == 1, (key, repairs)
    assert portable_config(llama.config, llama.spec, torch.float32, 0).repairs == []


@pytest.mark.parametrize("given", [320, -1, True, "0", 1.0, [], ["a"]])
def test_a_padding_id_that_is_no_token_is_left_out(llama, given):
    """transformers cannot build the embedding with a padding id beyond it."""
    result, repairs = portable_config(
        {**llama.config, "pad_token_id": given}, llama.spec, torch.float32, 0
    )
    assert "pad_token_id" not in result and "pad_token_id is" in repairs[-1]


def test_null_for_a_flag_means_false(llama):
    source = {**llama.config, "attention_bias": None, "mlp_bias": None, "tie_word_embeddings": None}
    result, repairs = portable_config(source, llama.spec, torch.float32, 0)
    assert (result["attention_bias"], result["mlp_bias"], repairs) == (False, False, [])
    transformers.AutoConfig.for_model(**result)


def test_heads_that_do_not_divide_the_hidden_size_are_told(llama):
    """transformers 5 refuses the source, too: it cannot be repaired."""
    changes = {"num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8, "use_cache": 1}
    result, repairs = portable_config({**llama.config, **changes}, llama.spec, torch.float32, 0)
    with pytest.raises(StrictDataclassError, match="not a multiple of the number of"):
        transformers.AutoConfig.for_model(**result)
    assert "refuses this model's own config.json" in repairs[0]
    assert "use_cache" in repairs[1] and len(repairs) == 2
    assert result["num_attention_heads"] == 3


WINDOW = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}


@pytest.mark.parametrize(
    ("family", "given", "expected"),
    [
        (
            "mistral",
            {"sliding_window": None, "layer_types": ["sliding_attention"] * 2},
            {"sliding_window": None},
        ),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": None},
            {"use_sliding_window": False, "sliding_window": None},
        ),
        (
            "qwen2",
            {"use_sliding_window": False, "sliding_window": 9},
            {"use_sliding_window": False, "sliding_window": None},
        ),
        ("qwen3", WINDOW, {**WINDOW, "layer_types": ["full_attention", "sliding_attention"]}),
        (
            "qwen3",
            {**WINDOW, "layer_types": ["sliding_attention"] * 2},
            {**WINDOW, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 2},
        ),
        ("llama_untied", {"layer_types": ["full_attention"] * 2}, {}),
    ],
)
def test_windows_and_layer_types_say_the_same(
    family: str, given: dict[str, Any], expected: dict[str, Any], request, tmp_path_factory
) -> None:
    """layer_types beside a window of null, or a list that says another thing, is refused by some
    reader: transformers when it makes the mask, vLLM when it builds the layers."""
    base = {
        "model_type": family.removesuffix("_untied"),
        **dict(vocab_size=24, hidden_size=16, intermediate_size=24, num_hidden_layers=2),
        **dict(num_attention_heads=4, num_key_value_heads=2, head_dim=4, max_window_layers=1),
    }
    shapes = {name: (24, 16) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    result, repairs = portable_config({**base, **given}, shapes, torch.float32, 0)
    keys = ("sliding_window", "use_sliding_window", "layer_types", "max_window_layers")
    unused = {} if "max_window_layers" in expected else {"max_window_layers": 1}
    assert {key: result[key] for key in keys if key in result} == {**unused, **expected}
    assert not repairs
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**result), attn_implementation="eager"
    )
    model(torch.arange(8)[None])  # it raises where it finds no window for its mask


@pytest.mark.parametrize(
    ("source", "expected", "said"),
    [
        (
            {"do_sample": False, "temperature": 0.6, "top_p": 0.9},
            {"do_sample": False},
            ["leaves out temperature=0.6", "leaves out top_p=0.9"],
        ),
        (
            {"temperature": 0.6, "top_p": 0.9},
            {"temperature": 0.6, "top_p": 0.9, "do_sample": True},
            ["adds do_sample=true, without which temperature, top_p do nothing"],
        ),
        ({"temperature": 1.0, "top_k": 50}, {"temperature": 1.0, "top_k": 50}, []),
        ({"early_stopping": True}, {}, ["early_stopping=True"]),
        ({"temperature": "0.6", "do_sample": True}, {"do_sample": True}, ["temperature='0.6'"]),
        ({"max_new_tokens": -3}, {}, ["max_new_tokens=-3"]),
        ({"output_scores": True}, {}, ["output_scores=True"]),
        ({"bos_token_id": [1], "unheard_of": 1}, {"unheard_of": 1}, ["bos_token_id"]),
        ({"cache_implementation": {}}, {}, ["cache_implementation"]),
    ],
)
def test_settings_that_contradict_each_other_are_repaired_and_said(
    tmp_path, source: dict[str, Any], expected: dict[str, Any], said: list[str]
) -> None:
    """transformers refuses to save what it warns about when it loads."""
    result, repairs = portable_generation_config(source, {}, 2)
    assert result == {**expected, "eos_token_id": 2}
    assert len(repairs) == len(said)
    for line, part in zip(repairs, said, strict=True):
        assert part in line and line.startswith("generation_config.json: ")
    settings = transformers.GenerationConfig(**result)
    settings.validate(strict=True)
    settings.save_pretrained(tmp_path)


@pytest.mark.parametrize("stops", ["</s>", {"id": 2}, [2, "x"], True, -1])
def test_a_stop_token_that_is_no_id_is_refused(stops: object) -> None:
    with pytest.raises(CheckpointError, match="generation_config.json: eos_token_id is"):
        portable_generation_config({"eos_token_id": stops}, {}, 2)
