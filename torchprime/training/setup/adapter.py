"""The adapter of a run: the model that it makes, and the values of that model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from torchprime.adapters.apply import apply_adapter, base_name, saved
from torchprime.adapters.lora import AdaptedLinear, initial_values
from torchprime.adapters.quantized import QuantizedLinear, quantize_base, quantized
from torchprime.adapters.spec import AdapterSpec
from torchprime.adapters.targets import LAYER_NUMBER
from torchprime.checkpoint.adapter.read import StoredAdapter
from torchprime.models.architecture import Architecture
from torchprime.models.decoder import CausalLM, generator_for
from torchprime.sharding import ShardingTable, shard_count

TensorOf = Callable[[str], Tensor]
# A PEFT folder, a Hugging Face folder of base and adapter merged, or both.
ExportForm = Literal["adapter", "merged", "both"]


@dataclass(frozen=True)
class Adapter:
    """An adapter, and the cut of the base that it is applied to.

    Attributes:
        table: of the model without adapters.
        mesh: the number of devices along each axis.
        form: of its export.
        start: the adapter to start from; None makes new values.
    """

    spec: AdapterSpec
    table: ShardingTable
    mesh: Mapping[str, int]
    form: ExportForm
    start: StoredAdapter | None = None

    def apply(self, model: CausalLM) -> None:
        """Put the adapter into a model, in place, and store the base in its type.

        Raises:
            ConfigError: see `apply_adapter` and `quantize_base`.
        """
        apply_adapter(model, self.spec)
        quantize_base(model, self.spec.base_type, self.groups_of)

    def groups_of(self, layer: str) -> int:
        """Return the number of shards along the inputs of a layer's weight."""
        spec = self.table.find(self.table.parameters, f"{layer}.weight")
        return 1 if spec is None else shard_count(spec[1:], self.mesh)


def build_model(
    architecture: Architecture, adapter: Adapter | None, dtype: torch.dtype
) -> CausalLM:
    """Return the model without storage, each parameter in its type; frozen ones need no gradient.

    Raises:
        ConfigError: an adapter that does not fit the model.
    """
    with torch.device("meta"):
        model = CausalLM(architecture)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if adapter is not None:
        adapter.apply(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
    return model


class ModelForm(NamedTuple):
    """A model before it has weights."""

    architecture: Architecture
    adapter: Adapter | None

    def build(self, dtype: torch.dtype) -> CausalLM:
        """Return the model without storage."""
        return build_model(self.architecture, self.adapter, dtype)

    def with_layers(self, count: int) -> ModelForm:
        """Return the form with so many layers, the adapter in all of them."""
        architecture = self.architecture.with_layers(count)
        adapter = self.adapter
        if adapter is not None:
            targets = (LAYER_NUMBER.sub(".layers.*.", each) for each in adapter.spec.targets)
            spec = replace(adapter.spec, layers=None, targets=tuple(dict.fromkeys(targets)))
            adapter = replace(adapter, spec=spec)
        return ModelForm(architecture, adapter)


class AdaptedTensors:
    """The values of an adapted model's parameters, by their names in it, computed on each call.

    A base's weight is quantized when the first of its parts is asked for, which is the largest; the
    others are kept until they are asked for.

    Args:
        model: without storage.
        base: the base's weights by Hugging Face name.
        trained: values of trained parameters, from a checkpoint or a PEFT folder; None makes new
            ones, and takes modules that are trained whole from the base.
        seed: of new values. They depend on seed and name, and not on the order of the calls.
        dtype: of the run's weights.
    """

    def __init__(
        self,
        model: CausalLM,
        spec: AdapterSpec,
        base: TensorOf,
        *,
        trained: TensorOf | None,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        self.model, self.spec, self.base = model, spec, base
        self.given, self.seed, self.dtype = trained, seed, dtype
        self.trained = saved(model).keys()
        adapted = [n for n, m in model.named_modules() if isinstance(m, AdaptedLinear)]
        self.numbers = {name: number for number, name in enumerate(adapted)}
        self.parts: dict[str, Tensor] = {}

    def __call__(self, name: str) -> Tensor:
        if name in self.trained and self.given is not None:
            return self.given(name)
        owner, _, last = name.rpartition(".")
        module = self.model.get_submodule(owner)
        if isinstance(module, QuantizedLinear) and last in module.parts:
            return self._part(owner, module, last)
        if last == "number":
            return torch.tensor(self.numbers[owner.rpartition(".")[0]], dtype=torch.int32)
        if ".lora_" in name:
            return self._new(name)
        return self.base(base_name(name))

    def _part(self, owner: str, module: QuantizedLinear, last: str) -> Tensor:
        name = f"{owner}.{last}"
        if name not in self.parts:
            stored = dict(zip(module.parts, self._quantized(owner).stored(), strict=True))
            self.parts |= {f"{owner}.{part}": tensor for part, tensor in stored.items()}
        return self.parts.pop(name)

    def _quantized(self, owner: str) -> QuantizedLinear:
        """Return the layer with the base's weight."""
        layer = self.model.get_submodule(owner)
        assert isinstance(layer, QuantizedLinear)
        weight = self.base(base_name(f"{owner}.weight")).to(self.dtype)
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        packed = getattr(layer, "packed", None)
        groups = 1 if packed is None else packed.shape[1]
        made = quantized(linear, owner, self.spec.base_type, groups)
        assert isinstance(made, QuantizedLinear)
        return made

    def _new(self, name: str) -> Tensor:
        """Return the first value of an adapter's parameter."""
        owner, _, part = name.partition(".lora_")
        layer = self.model.get_submodule(owner)
        assert isinstance(layer, AdaptedLinear)
        weight = layer.lora_B.weight.new_empty(layer.lora_B.out_features, layer.lora_A.in_features)
        if part == "magnitude_vector":
            weight = self._dequantized(owner, layer)
        generator = generator_for(self.seed, name)
        return initial_values(self.spec, weight, generator)[f"lora_{part}"]

    def _dequantized(self, owner: str, layer: AdaptedLinear) -> Tensor:
        base = f"{owner}.base_layer"
        if isinstance(layer.base_layer, QuantizedLinear):
            return self._quantized(base).dequantized()
        return self.base(f"{owner}.weight").to(self.dtype)
