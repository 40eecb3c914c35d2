"""Quantized weights on this backend: the order of dims in which their parts are stored, and their
values."""

from __future__ import annotations

import pytest
import torch
import torch_xla
from torch import nn

from torchprime.adapters import nf4
from torchprime.adapters.quantized import Nf4Linear
from torchprime.torch_xla_models.linear import (
    XlaNf4Linear,
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


# Inputs and their groups: whole blocks in the high and in the low bits, or parts of blocks.
SIZES = [(256, 1), (256, 2), (256, 4), (384, 2), (160, 1)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("inputs", "groups"), SIZES)
def test_nf4_weights_are_equal_to_the_bit(inputs: int, groups: int, dtype: torch.dtype) -> None:
    """As a TPU and as a CPU dequantizes them, to the values that the CPU's eager mode has."""
    linear = nn.Linear(inputs, 48, bias=False, dtype=dtype)
    generator = torch.Generator().manual_seed(inputs + groups)
    linear.weight.data = torch.randn(48, inputs, generator=generator).pow(3).to(dtype)
    expected = nf4.dequantize(nf4.quantize(linear.weight.detach(), groups), dtype)
    model = nn.Sequential(Nf4Linear(linear, groups))
    replace_linears(model, lambda layer, part, tensor: tensor, apart=False)
    layer = model.to(torch_xla.device())[0]
    assert isinstance(layer, XlaNf4Linear)
    for level, in_blocks in ((nf4.level_by_selects, True), (nf4.level_by_lookup, False)):
        layer.level, layer.in_blocks = level, in_blocks
        assert torch.equal(layer.dequantized().cpu(), expected)
