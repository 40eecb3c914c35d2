"""Sharding of adapters follows that of their weight, for the tables that ship."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from torchprime.adapters.apply import apply_adapter
from torchprime.adapters.axes import adapter_patterns
from torchprime.adapters.lora import A, B
from torchprime.adapters.quantized import quantize_base
from torchprime.adapters.spec import AdapterSpec, BaseType
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable

CONFIGS = sorted((Path(__file__).parents[3] / "configs" / "sharding").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_parameter_of_an_adapted_model_has_a_place(path: Path, ours: CausalLM) -> None:
    raw = yaml.safe_load(path.read_text())["parameters"]
    before = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    apply_adapter(ours, AdapterSpec(rank=4, alpha=8, dora=True))
    table = ShardingTable(adapter_patterns(raw), {"batch": [["data", "fsdp"], None]})
    mesh: dict[str, int] = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), 2)
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    specs = table.parameter_specs(shapes, mesh)
    weights = ShardingTable(raw, {}).parameter_specs(before, mesh)
    for name, (outputs, inputs) in ((n, s) for n, s in weights.items() if "_proj.weight" in n):
        layer = name.removesuffix(".weight")
        assert specs[f"{layer}.base_layer.weight"] == (outputs, inputs)
        assert specs[f"{layer}.lora_A.weight"] == ((), inputs)
        assert specs[f"{layer}.lora_B.weight"] == (outputs, ())
        assert specs[f"{layer}.lora_magnitude_vector"] == (outputs,)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_large_matrices_are_cut_along_fsdp_too(path: Path, ours: CausalLM) -> None:
    """Along each axis once, and along tensor only where the weight is, whose sums need it so."""
    raw = yaml.safe_load(path.read_text())["parameters"]
    apply_adapter(ours, AdapterSpec(rank=4, alpha=8))
    table = ShardingTable(adapter_patterns(raw, ("data", "fsdp")), {})
    mesh: dict[str, int] = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), 2)
    shapes = {name: tuple(p.shape) for name, p in ours.named_parameters()}
    specs = table.parameter_specs(shapes, mesh)
    layers = [name.removesuffix(A) for name in specs if name.endswith(A)]
    assert len(layers) == 2 * 7
    for layer in layers:
        outputs, inputs = specs[f"{layer}.base_layer.weight"]
        (rank, a), (b, other_rank) = specs[f"{layer}{A}"], specs[f"{layer}{B}"]
        assert rank == other_rank == ()
        assert a[: len(inputs)] == inputs and b[: len(outputs)] == outputs
        for cut, own in ((a, inputs), (b, outputs)):
            assert sorted(cut) == ["fsdp", *(["tensor"] if "tensor" in own else [])], layer


@pytest.mark.parametrize("kind", ["int8", "nf4"])
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_parts_of_a_quantized_weight_are_cut_like_it(
    path: Path, kind: BaseType, ours: CausalLM
) -> None:
    """Also of layers without an adapter, and their biases."""
    raw = yaml.safe_load(path.read_text())["parameters"]
    apply_adapter(ours, AdapterSpec(rank=4, alpha=8, targets=("q_proj",), base_type=kind))
    quantize_base(ours, kind, lambda _: 1)
    table = ShardingTable(adapter_patterns(raw), {"batch": [["data", "fsdp"], None]})
    mesh: dict[str, int] = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), 1)
    specs = table.parameter_specs({n: tuple(p.shape) for n, p in ours.named_parameters()}, mesh)
    for layer in ("q_proj.base_layer", "k_proj"):
        prefix = f"model.layers.0.self_attn.{layer}"
        outputs, inputs = (tuple(dim) for dim in _spec_of(raw, "self_attn.k_proj.weight"))
        assert specs[f"{prefix}.bias"] == (outputs,)
        if kind == "int8":
            assert specs[f"{prefix}.codes"] == (outputs, inputs)
            assert specs[f"{prefix}.scales"] == (outputs,)
        else:
            assert specs[f"{prefix}.packed"] == (outputs, inputs, ())
            assert specs[f"{prefix}.scale_codes"] == (outputs, inputs)


def _spec_of(raw: dict, name: str) -> list[list[str]]:
    given = raw[f"model.layers.*.{name}"]
    return [[] if d is None else [d] if isinstance(d, str) else d for d in given]
