"""Sharding of adapters follows that of their weight, for the tables that ship."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from torchprime.adapters.apply import apply_adapter
from torchprime.adapters.axes import adapter_patterns
from torchprime.adapters.spec import AdapterSpec
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
