"""The proofs after an export must fail on an export that is wrong."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from torchprime.checkpoint.verify import (
    compare_logits,
    load_transformers,
    read_back,
    transformers_logits,
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
    assert load_transformers(folder).dtype == torch.bfloat16
    assert transformers_logits(folder, IDS).dtype == np.float32


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
    assert compare_logits(result.folder, IDS, trained, tolerance=1e-5) < 1e-5
    path = result.folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="logits differ"):
        compare_logits(result.folder, IDS, trained, tolerance=1e-3)


def test_logits_that_are_not_numbers_fail(result):
    trained = transformers_logits(result.folder, IDS)
    trained[0, 0, 0] = np.nan
    with pytest.raises(CheckpointError, match="logits differ"):
        compare_logits(result.folder, IDS, trained, tolerance=1.0)
    with pytest.raises(CheckpointError, match="shape"):
        compare_logits(result.folder, IDS, trained[:1], tolerance=1.0)
