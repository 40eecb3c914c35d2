"""Merged weights against PEFT's merge_and_unload, and values of a quantized base."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor

from torchprime.checkpoint.adapter.merge import base_in_run, merged_tensors
from torchprime.checkpoint.adapter.read import read_adapter
from torchprime.checkpoint.hf.read import SafetensorsReader


def test_merged_weights_are_those_of_peft(each: Any) -> None:
    stored, base = read_adapter(each.folder), SafetensorsReader(each.base)
    tensor_of = merged_tensors(base.get, stored.tensors, stored.spec, torch.float32)
    different = 0
    for name in base.names():
        mine, theirs = tensor_of(name), each.merged[name]
        assert (mine - theirs).abs().max() <= 1e-6 * theirs.abs().max()
        different += not torch.equal(mine, base.get(name))
    adapted = sum(name.endswith("lora_A.weight") for name in stored.tensors)
    whole = sum("lora_" not in name for name in stored.tensors)
    assert different == adapted + whole


def test_a_merge_is_rounded_once(by_peft) -> None:
    made = by_peft("lora")
    stored, base = read_adapter(made.folder), SafetensorsReader(made.base)
    name = "model.layers.0.mlp.up_proj.weight"
    narrow, wide = (
        merged_tensors(base.get, stored.tensors, stored.spec, dtype, run_dtype=torch.float32)(name)
        for dtype in (torch.bfloat16, torch.float32)
    )
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())


def by_bitsandbytes(weight: Tensor) -> Tensor:
    packed, state = bnb.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return bnb.dequantize_4bit(packed, state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantized_base_is_merged_into_the_values_it_was_trained_on(by_peft, dtype) -> None:
    made = by_peft("lora")
    stored, base = read_adapter(made.folder), SafetensorsReader(made.base)
    spec = replace(stored.spec, base_type="nf4")
    tensor_of = merged_tensors(base.get, stored.tensors, spec, torch.float32, run_dtype=dtype)
    name = "model.layers.1.self_attn.o_proj"
    trained = by_bitsandbytes(base.get(f"{name}.weight").to(dtype)).float()
    a, b = (stored.tensors[f"{name}.lora_{part}.weight"] for part in "AB")
    torch.testing.assert_close(tensor_of(f"{name}.weight"), trained + spec.scale * (b @ a))
    untouched = "model.norm.weight"
    assert torch.equal(tensor_of(untouched), base.get(untouched).to(dtype).float())


def test_int8_has_one_scale_for_each_output() -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    step = weight.abs().amax(1, keepdim=True) / 127
    found = base_in_run("x.weight", weight, "int8", torch.float32)
    assert ((found - weight).abs() <= step / 2 * 1.0001).all()
    assert not torch.equal(found, weight)
    assert base_in_run("x.weight", weight, "run", torch.bfloat16).dtype == torch.bfloat16


def test_linear_layers_without_adapter_are_quantized_too(by_peft) -> None:
    made = by_peft("rslora")  # on q_proj and down_proj
    stored, base = read_adapter(made.folder), SafetensorsReader(made.base)
    spec = replace(stored.spec, base_type="nf4")
    tensor_of = merged_tensors(base.get, stored.tensors, spec, torch.float32)
    other = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(tensor_of(other), by_bitsandbytes(base.get(other)))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(tensor_of(name), base.get(name))


def test_one_tensor_of_the_base_in_memory_at_a_time(by_peft) -> None:
    made = by_peft("lora")
    stored, base = read_adapter(made.folder), SafetensorsReader(made.base)
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def read(name: str) -> Tensor:
        nonlocal most
        most = max(most, sum(ref() is not None for ref in alive))
        tensor = base.get(name).clone()
        alive.append(weakref.ref(tensor))
        return tensor

    tensor_of = merged_tensors(read, stored.tensors, stored.spec, torch.bfloat16)
    for name in base.names():
        tensor_of(name)
    assert most == 0 and len(alive) == len(base.names())
