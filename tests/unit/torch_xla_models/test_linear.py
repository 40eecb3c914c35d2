"""The order of dims in which this backend stores the parts of a quantized weight."""

from __future__ import annotations

import pytest
import torch

from torchprime.torch_xla_models.linear import original_shape, turned, turned_spec

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
