"""Merged folders against PEFT's merge_and_unload, loaded in transformers."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from torchprime.checkpoint.adapter.merged_export import Merge, export_merged
from torchprime.checkpoint.adapter.parts import adapter_parts
from torchprime.checkpoint.adapter.read import read_adapter
from torchprime.checkpoint.proof.recheck import recheck
from torchprime.errors import CheckpointError


def test_the_merged_folder_is_what_peft_merges(each: Any, ids: Tensor, tmp_path: Path) -> None:
    said: list[str] = []
    merge = Merge(read_adapter(each.folder), each.base, str(each.base))
    result = export_merged(merge, tmp_path / "out", said.append)
    assert "logits of transformers match" in said[-1] and len(said) == 1
    assert result.certificate is not None and not result.certificate.failed
    assert result.certificate.check("logits").values["max_difference"] < 1e-5
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        theirs = each.merged[name]
        assert (tensor - theirs).abs().max() <= 1e-6 * theirs.abs().max()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert (logits - each.logits).abs().max() <= 1e-5 * each.logits.abs().max()
    _, again = recheck(tmp_path / "out", each.base)
    assert not [check for check in again if check.passed is False]


def test_a_quantized_base_is_merged_as_it_was_trained(by_peft, tmp_path: Path) -> None:
    made = by_peft("lora")
    merge = Merge(read_adapter(made.folder), made.base, "base", torch.bfloat16, "nf4")
    said: list[str] = []
    result = export_merged(merge, tmp_path / "out", said.append)
    assert "into the nf4 values of base" in said[-1] and "is used on 'base'" in said[0]
    assert result.certificate is not None
    assert result.certificate.check("logits").values["max_difference"] < 3e-2
    other = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    away = (other[name].float() - made.merged[name]).abs().max()
    assert away > 0.01  # the quantization's error


def test_rows_for_new_tokens_are_merged_too(by_peft, tmp_path: Path) -> None:
    made = by_peft("whole modules")
    folder = Path(shutil.copytree(made.folder, tmp_path / "adapter"))
    tensors = load_file(folder / "adapter_model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[f"base_model.model.{name}"] = torch.randn(328, 64)
    (folder / "adapter_model.safetensors").unlink()
    save_file(tensors, folder / "adapter_model.safetensors")
    merge = Merge(read_adapter(folder), made.base, str(made.base))
    result = export_merged(merge, tmp_path / "out", lambda line: None)
    assert result.certificate is not None and not result.certificate.failed
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == 328
    theirs = tensors["base_model.model.lm_head.weight"]
    assert torch.equal(model.lm_head.weight, theirs)


def test_a_base_of_half_precision_needs_a_type(by_peft, tmp_path: Path) -> None:
    made = by_peft("lora")
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    save_file({n: t.half() for n, t in tensors.items()}, base / "model.safetensors")
    merge = Merge(read_adapter(made.folder), base, str(base))
    with pytest.raises(CheckpointError, match="--dtype bf16 or fp32"):
        merge.check()
    replace(merge, dtype=torch.bfloat16).check()


def test_a_quantized_base_is_refused_with_the_fix(by_peft, tmp_path: Path) -> None:
    made = by_peft("lora")
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"quantized weights.*give the checkpoint it was made"
    ):
        export_merged(Merge(read_adapter(made.folder), base, "b"), tmp_path / "out", print)
    assert not (tmp_path / "out").exists()


def test_a_base_that_nf4_cannot_store(by_peft, make_base, tmp_path: Path) -> None:
    made = by_peft("lora")
    adapter = read_adapter(made.folder)
    spec = replace(adapter.spec, targets=("v_proj",), rank=1)
    small = make_base(hidden=32)
    shapes = adapter_parts(json.loads((small / "config.json").read_text()), spec).shapes
    ones = {name: torch.ones(shape) for name, shape in shapes.items()}
    stored = replace(adapter, spec=spec, tensors=ones)
    Merge(stored, small, "small", base_type="int8").check()
    with pytest.raises(CheckpointError, match=r"--base-dtype: given nf4.*has 32 inputs"):
        export_merged(Merge(stored, small, "small", base_type="nf4"), tmp_path / "out", print)


def test_a_base_without_stop_token(by_peft, tmp_path: Path) -> None:
    made = by_peft("lora")
    base = Path(shutil.copytree(made.base, tmp_path / "base"))
    (base / "generation_config.json").unlink()
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "eos_token_id": None}))
    with pytest.raises(CheckpointError, match=r"name no stop token \(eos_token_id"):
        export_merged(Merge(read_adapter(made.folder), base, "b"), tmp_path / "out", print)
