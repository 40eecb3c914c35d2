"""Values of an adapted model's parameters, against the base's own and bitsandbytes' NF4."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes.functional as reference
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.certificate import base_fingerprint
from torchprime.models.architecture import Architecture, architecture_from_hf
from torchprime.sharding import ShardingTable
from torchprime.training.setup.adapter import AdaptedTensors, Adapter, ModelForm, build_model
from torchprime.training.setup.model_files import ModelFiles

SIZES = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TABLE = ShardingTable({"model.layers.*.mlp.down_proj.weight": ["fsdp", "tensor"]}, {})
Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def architecture() -> Architecture:
    return architecture_from_hf(SIZES)


@pytest.fixture(scope="module")
def base(architecture: Architecture) -> Callable[[str], Tensor]:
    """Weights of the model without an adapter, by Hugging Face name."""
    names = dict(build_model(architecture, None, torch.float32).named_parameters())
    generator = torch.Generator().manual_seed(3)
    values = {n: torch.randn(p.shape, generator=generator) for n, p in names.items()}
    return values.__getitem__


def adapter_of(**spec: object) -> Adapter:
    made = AdapterSpec(rank=4, alpha=8, **spec)  # type: ignore[arg-type]
    return Adapter(made, TABLE, {"fsdp": 2, "tensor": 2}, "merged")


def tensors(
    architecture: Architecture,
    adapter: Adapter,
    base: Callable[[str], Tensor],
    trained: Callable[[str], Tensor] | None = None,
    seed: int = 1,
) -> AdaptedTensors:
    model = build_model(architecture, adapter, torch.float32)
    return AdaptedTensors(
        model, adapter.spec, base, trained=trained, seed=seed, dtype=torch.float32
    )


def test_every_parameter_has_a_value_of_its_shape_and_type(architecture, base) -> None:
    for adapter in (adapter_of(dora=True), adapter_of(base_type="nf4"), adapter_of(dropout=0.1)):
        of = tensors(architecture, adapter, base)
        for name, parameter in of.model.named_parameters():
            value = of(name)
            assert (value.shape, value.dtype) == (parameter.shape, parameter.dtype), name


def test_frozen_weights_are_the_bases(architecture, base) -> None:
    of = tensors(architecture, adapter_of(), base)
    assert torch.equal(of(f"{Q}.base_layer.weight"), base(f"{Q}.weight"))
    assert torch.equal(of("model.norm.weight"), base("model.norm.weight"))


def test_new_values_are_pefts_kind_and_depend_on_seed_and_name(architecture, base) -> None:
    of = tensors(architecture, adapter_of(), base)
    a = of(f"{Q}.lora_A.weight")
    assert torch.equal(a, of(f"{Q}.lora_A.weight"))
    # kaiming_uniform_(a=sqrt(5)), PEFT's: a bound of 1 / sqrt(inputs).
    assert 0.9 * 64**-0.5 < a.abs().max() <= 64**-0.5
    assert not torch.equal(a, of(Q.replace("0", "1") + ".lora_A.weight"))
    assert not torch.equal(
        a, tensors(architecture, adapter_of(), base, seed=2)(f"{Q}.lora_A.weight")
    )
    assert not of(f"{Q}.lora_B.weight").any()


def test_parts_of_a_quantized_weight_are_bitsandbytes(architecture, base) -> None:
    of = tensors(architecture, adapter_of(base_type="nf4"), base)
    packed, state = reference.quantize_4bit(
        base(f"{Q}.weight"), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(of(f"{Q}.base_layer.scale_codes").flatten(), state.absmax)
    assert state.offset is not None
    assert torch.equal(of(f"{Q}.base_layer.offset"), state.offset)
    assert of("model.layers.0.mlp.down_proj.base_layer.packed").shape == (64, 2, 32)


def test_magnitudes_are_norms_of_the_weight_that_is_used(architecture, base) -> None:
    of = tensors(architecture, adapter_of(base_type="nf4", dora=True), base)
    packed, state = reference.quantize_4bit(
        base(f"{Q}.weight"), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    used = reference.dequantize_4bit(packed, state)
    torch.testing.assert_close(of(f"{Q}.lora_magnitude_vector"), used.norm(dim=1))


def test_given_values_come_before_new_ones(architecture, base) -> None:
    given = {f"{Q}.lora_A.weight": torch.ones(4, 64), "lm_head.weight": torch.ones(32, 64)}
    adapter = adapter_of(modules_to_train=("lm_head",))
    of = tensors(architecture, adapter, base, given.__getitem__)
    for name, value in given.items():
        assert torch.equal(of(name), value)
    started = tensors(architecture, adapter, base)("lm_head.weight")
    assert torch.equal(started, base("lm_head.weight"))


def test_layers_have_their_numbers_for_dropout(architecture, base) -> None:
    of = tensors(architecture, adapter_of(), base)
    names = [n for n, _ in of.model.named_parameters() if n.endswith(".number")]
    assert [int(of(name)) for name in names] == list(range(14))


def test_a_run_and_a_certificate_hash_a_base_alike(tmp_path: Path) -> None:
    """Also one whose tied embedding is stored as the output head."""
    save_file({"lm_head.weight": torch.ones(32, 64)}, tmp_path / "model.safetensors")
    tied = architecture_from_hf({**SIZES, "tie_word_embeddings": True})
    nothing: Any = None
    files = ModelFiles(tmp_path, {}, tied, nothing, {})
    assert files.base_fingerprint() == base_fingerprint(tmp_path)["sha256"]


def test_fewer_layers_have_the_adapter_of_one_layer(architecture) -> None:
    """The estimate of memory builds a model of one layer; full names name others."""
    form = ModelForm(architecture, adapter_of(targets=(Q.replace("0", "1"), Q)))
    model = form.with_layers(1).build(torch.float32)
    adapted = {n.partition(".lora_")[0] for n, _ in model.named_parameters() if "lora_" in n}
    assert adapted == {Q}
