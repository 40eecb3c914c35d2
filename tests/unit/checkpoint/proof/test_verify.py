"""The proofs after an export must fail on an export that is wrong."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from torchprime.checkpoint.proof.logits import decoder_logits
from torchprime.checkpoint.proof.verify import (
    LogitsMatch,
    NotChecked,
    compare_logits,
    judge_logits,
    load_transformers,
    logits_of,
    read_back,
    rounding_floor,
)
from torchprime.errors import CheckpointError

IDS = np.arange(24).reshape(2, 12)


@pytest.fixture
def result(llama, export, tmp_path):
    return export(tmp_path / "out", llama)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


def test_one_flipped_bit_is_found_and_named(result):
    read_back(result.folder, result.hashes)
    path = result.folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # the last byte of the last tensor of the plan
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"different 1 \(model.norm.weight\)|lm_head.weight"):
        read_back(result.folder, result.hashes)


def test_swapped_equal_shapes_missing_and_strange_are_found(result):
    def change(weights):
        first, second = (f"model.layers.{i}.input_layernorm.weight" for i in (0, 1))
        weights[first], weights[second] = weights[second], weights[first]
        del weights["model.norm.weight"]
        weights["strange"] = torch.ones(1)

    rewrite(result.folder, change)
    with pytest.raises(CheckpointError) as caught:
        read_back(result.folder, result.hashes)
    message = str(caught.value)
    assert "different 2 (" in message and "layers.1.input_layernorm" in message
    assert "missing 1 (model.norm.weight)" in message and "unexpected 1 (strange)" in message


def test_transformers_filling_in_random_weights_is_an_error(result):
    rewrite(result.folder, lambda weights: weights.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match="missing_keys.*layers.1.mlp.up_proj"):
        load_transformers(result.folder)


def test_unknown_weights_in_transformers_are_an_error(result):
    rewrite(result.folder, lambda weights: weights.update({"model.extra": torch.ones(1)}))
    with pytest.raises(CheckpointError, match="unexpected_keys.*model.extra"):
        load_transformers(result.folder)


def test_model_is_loaded_in_its_own_dtype(llama, export, tmp_path):
    folder = export(tmp_path / "out", llama, dtype=torch.bfloat16).folder
    model = load_transformers(folder)
    assert model.dtype == torch.bfloat16
    assert logits_of(model, IDS).dtype == np.float32


def test_old_spelling_of_the_dtype_is_read(result):
    path = result.folder / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    path.write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    assert load_transformers(result.folder).dtype == torch.bfloat16


def test_equal_logits_pass_and_a_wrong_rope_fails(llama, result):
    model = transformers.LlamaForCausalLM.from_pretrained(llama.folder, attn_implementation="eager")
    with torch.no_grad():
        trained = model(torch.as_tensor(IDS)).logits.numpy()
    match = compare_logits(result.folder, IDS, trained, least=1e-5)
    assert match.difference < 1e-5 == match.tolerance and match.floor is None
    path = result.folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="logits differ"):
        compare_logits(result.folder, IDS, trained, least=1e-3)


def test_logits_that_are_not_numbers_fail(result):
    trained = logits_of(load_transformers(result.folder), IDS)
    trained[0, 0, 0] = np.nan
    with pytest.raises(CheckpointError, match="logits differ"):
        compare_logits(result.folder, IDS, trained, least=1.0)
    with pytest.raises(CheckpointError, match="shape"):
        compare_logits(result.folder, IDS, trained[:1], least=1.0)


@pytest.fixture
def one_thread():
    """The products are tiny: several threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def deep_model(
    folder: Path, dtype: torch.dtype, spread: float, layers: int = 16
) -> tuple[transformers.LlamaConfig, dict[str, torch.Tensor]]:
    """A model with weights so large that bf16 rounds its logits by some percent, saved."""
    torch.manual_seed(5)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0.0, spread)
    model.to(dtype).save_pretrained(folder)  # pyright: ignore[reportArgumentType]
    return config, dict(model.named_parameters())


LONGER = np.arange(40).reshape(1, 40) * 5 % 256


def test_a_deep_model_in_bf16_is_judged_by_its_own_rounding(tmp_path, one_thread) -> None:
    """Our decoder is right, and its logits differ by more than any fixed margin one would dare."""
    config, weights = deep_model(tmp_path, torch.bfloat16, 0.15)

    def decoder(**changes: Any) -> np.ndarray:
        tensor_of = weights.__getitem__
        given = {**config.to_dict(), **changes}
        return decoder_logits(given, lambda n: tensor_of(n).detach(), torch.bfloat16, LONGER)

    match = compare_logits(tmp_path, LONGER, decoder(), least=1e-2)
    assert match.floor is not None and 5e-2 < match.difference <= 3 * match.floor < 0.3, match
    for changes in ({"num_hidden_layers": 15}, {"rope_parameters": {"rope_theta": 2e4}}):
        with pytest.raises(CheckpointError, match="3 times what rounding does to this model"):
            compare_logits(tmp_path, LONGER, decoder(**changes), least=1e-2)


def test_a_small_fault_of_a_shallow_model_is_no_rounding(tmp_path) -> None:
    """4% of the largest logit is much where rounding makes less than 1%."""
    config, weights = deep_model(tmp_path, torch.bfloat16, 0.03, layers=2)
    weights["model.norm.weight"] = weights["model.norm.weight"] * 1.04
    trained = decoder_logits(config.to_dict(), weights.__getitem__, torch.bfloat16, LONGER)
    with pytest.raises(CheckpointError, match=r"differ by [34]\.\d+e-02"):
        compare_logits(tmp_path, LONGER, trained, least=1e-2)


def test_where_rounding_is_all_the_check_is_not_made(monkeypatch) -> None:
    """Unless the logits differ by more than even that, or are no numbers."""
    monkeypatch.setattr("torchprime.checkpoint.proof.verify.rounding_floor", lambda *_: 0.15)

    def judge(difference: float) -> LogitsMatch:
        return judge_logits(None, LONGER, LONGER, difference, 1e-2)

    with pytest.raises(NotChecked, match="rounding alone moves this model's by 1e-01"):
        judge(0.44)
    assert judge(0.29).within and not judge(0.46).within and not judge(math.nan).within


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_floor_is_the_distance_to_the_whole_model_in_a_wider_dtype(tmp_path, dtype) -> None:
    deep_model(tmp_path, dtype, 0.1, layers=3)
    model = load_transformers(tmp_path)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    logits = logits_of(model, LONGER)
    floor = rounding_floor(model, LONGER, logits)
    after = dict(model.named_parameters())
    assert all(p.dtype == dtype and torch.equal(p, after[n]) for n, p in before.items())
    wider = model.to(torch.float64 if dtype == torch.float32 else torch.float32)
    reference = logits_of(wider, LONGER)
    assert floor == np.abs(logits - reference).max() / np.abs(reference).max() > 0
