"""The order of dims of a stored quantized weight, and the sum of a weight and its adapter."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch_xla
from torch import nn

from torchprime.adapters.dropout import DropoutPosition, set_position
from torchprime.adapters.lora import AdaptedLinear
from torchprime.adapters.spec import AdapterSpec
from torchprime.torch_xla_models.linear import (
    XlaAdapted,
    XlaLinear,
    original_shape,
    replace_linears,
    turned,
    turned_spec,
)

# By part: the shape [O, ...] outside, then shape and spec here; outputs on tensor, inputs on fsdp.
PARTS = {
    "packed": ((6, 2, 16), (2, 16, 6), (("fsdp",), (), ("tensor",))),
    "scale_codes": ((6, 4), (4, 6), (("fsdp",), ("tensor",))),
    "scale_scales": ((5,), (5,), ((),)),
    "offset": ((), (), ()),
    "codes": ((6, 8), (6, 8), (("tensor",), ("fsdp",))),
}
SPECS = {
    "packed": (("tensor",), ("fsdp",), ()),
    "scale_codes": (("tensor",), ("fsdp",)),
    "scale_scales": ((),),
    "offset": (),
    "codes": (("tensor",), ("fsdp",)),
}


@pytest.mark.parametrize("part", PARTS)
def test_outputs_are_the_last_dim_of_nf4(part: str) -> None:
    shape, here, spec = PARTS[part]
    name = f"model.layers.0.mlp.up_proj.base_layer.{part}"
    tensor = turned(name, torch.arange(torch.Size(shape).numel()).view(shape))
    assert tensor.shape == here and tensor.is_contiguous()
    assert original_shape(name, here) == shape
    assert turned_spec(name, SPECS[part]) == spec


def test_an_outputs_codes_stay_together() -> None:
    packed = torch.arange(6 * 2 * 16).view(6, 2, 16)
    here = turned("packed", packed)
    for output in range(6):
        assert torch.equal(here[..., output], packed[output])


def adapted_layer(inputs: int, outputs: int, **more: Any) -> nn.Module:
    """A module whose only child is an adapted layer with a bias and random weights."""
    torch.manual_seed(3)
    base = nn.Linear(inputs, outputs)
    layer = AdaptedLinear(base, AdapterSpec(rank=3, alpha=6, **more), 0)
    nn.init.normal_(layer.lora_B.weight)
    return nn.Sequential(layer)


def for_xla(model: nn.Module, apart: bool = False) -> tuple[nn.Module, XlaAdapted]:
    """Return the model with this backend's layers, and the only one."""
    replace_linears(model, lambda layer, part, tensor: tensor, apart=apart)
    layer = model.get_submodule("0")
    assert isinstance(layer, XlaAdapted)
    return model, layer


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("inputs, outputs", [(8, 12), (12, 8)])
def test_an_adapter_in_the_weight_computes_as_beside_it(
    inputs: int, outputs: int, apart: bool
) -> None:
    plain = adapted_layer(inputs, outputs)
    x, grad = torch.randn(2, 8, inputs, requires_grad=True), torch.randn(2, 8, outputs)
    expected = [plain(x)]
    trained = [x, *(p for p in plain.parameters() if p.requires_grad)]
    expected += torch.autograd.grad(expected[0], trained, grad)

    device = torch_xla.device()
    model, layer = for_xla(copy.deepcopy(plain).to(device), apart)
    here = x.detach().to(device).requires_grad_()
    assert isinstance(layer.base_layer, XlaLinear) and layer.adds_up(layer.base_layer, here)
    found = [model(here)]
    trained = [here, *(p for p in model.parameters() if p.requires_grad)]
    found += torch.autograd.grad(found[0], trained, grad.to(device))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.detach().cpu(), theirs.detach(), rtol=1e-5, atol=1e-5)


def test_an_adapter_stays_beside_the_weight() -> None:
    """The sum would round it away, take longer, or compute something else."""
    few, many = torch.empty(1, 1, 8), torch.empty(2, 8, 8)

    def adds_up(x: torch.Tensor, dtype: torch.dtype = torch.float32, **more: Any) -> bool:
        model, layer = for_xla(adapted_layer(8, 12, **more).to(dtype))
        one = torch.zeros((), dtype=torch.int32)
        set_position(model, DropoutPosition(one, one, torch.zeros(2, 8, dtype=torch.int32)))
        assert isinstance(layer.base_layer, XlaLinear)
        return layer.adds_up(layer.base_layer, x)

    assert adds_up(many)
    assert not adds_up(few)
    assert not adds_up(many, torch.bfloat16)
    assert not adds_up(many, dora=True)
    assert not adds_up(many, dropout=0.1)
