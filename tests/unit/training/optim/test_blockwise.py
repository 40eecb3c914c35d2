"""8-bit blocks against bitsandbytes' maps and a search for the nearest level."""

from __future__ import annotations

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map

from torchprime.training.optim.blockwise import dequantize, quantize


@pytest.mark.parametrize("signed", [True, False])
def test_levels_are_bitsandbytes(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    for scale in (1.0, 3e-7):
        found = dequantize(codes, torch.tensor([[scale]]), signed=signed)[0]
        torch.testing.assert_close(found, create_dynamic_map(signed) * scale, rtol=1e-6, atol=0)


@pytest.mark.parametrize("signed", [True, False])
def test_each_value_becomes_the_nearest_level(signed: bool) -> None:
    torch.manual_seed(0)
    values = torch.randn(64, 512) * 10 ** (7 * torch.rand(64, 512) - 7)
    values[0] = 0
    values = values if signed else values.abs()
    codes, scales = quantize(values, 256, signed=signed)
    assert codes.dtype == torch.uint8 and scales.shape == (64, 2)
    blocks = values.double().view(64, 2, 256)
    largest = blocks.abs().amax(-1)
    assert torch.equal(scales.double(), largest)
    levels = create_dynamic_map(signed).double()
    normal = torch.nan_to_num(blocks / largest[..., None])
    distance = (normal[..., None] - levels).abs()
    nearest, own = distance.amin(-1), distance.gather(-1, codes.view(64, 2, 256, 1).long())[..., 0]
    if signed:
        assert (own <= nearest + 1e-6 * normal.abs()).all()
    else:  # what is above 0 stays above 0
        lowest = levels[1]
        assert (
            own <= torch.where(normal > 0, nearest.maximum(lowest), nearest) + 1e-6 * normal
        ).all()
        assert torch.equal(codes.view(64, 2, 256) > 0, normal > 0)
    back = quantize(levels.float()[None], 256, signed=signed)
    assert torch.equal(back.codes[0], torch.arange(256, dtype=torch.uint8))
    found = dequantize(codes, scales, signed=signed)
    torch.testing.assert_close(
        found, (levels[codes.long()] * largest.repeat_interleave(256, 1)).float(), rtol=1e-6, atol=0
    )
    assert torch.equal(found[0], torch.zeros(512))


def test_blocks_need_not_be_of_256() -> None:
    values = torch.randn(3, 4, 86)
    codes, scales = quantize(values, 43, signed=True)
    assert scales.shape == (3, 4, 2)
    found = dequantize(codes, scales, signed=True)
    assert (found - values).abs().max() < 0.01 * values.abs().max()
