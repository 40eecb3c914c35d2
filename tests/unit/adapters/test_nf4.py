"""NF4 against bitsandbytes' own CPU build: codes, scales, dequantized values."""

from __future__ import annotations

import bitsandbytes.functional as reference
import pytest
import torch
from torch import Tensor

from torchprime.adapters import nf4


def edges() -> Tensor:
    """Rows of zeros, of one value, of midpoints between levels, tiny and huge ones."""
    levels = torch.tensor(nf4.LEVELS)
    middles = (levels[1:] + levels[:-1]) / 2
    rows = torch.zeros(8, 128)
    rows[1] = 3.0
    rows[2] = -1e-30
    rows[3, : middles.numel()] = middles
    rows[3, 64:80] = levels
    rows[3, 63] = 1.0
    rows[4] = 1e30
    rows[5, 7] = 1e-39  # below the smallest normal number
    rows[6] = torch.linspace(-2, 2, 128)
    rows[7, ::2] = -0.0
    return rows


WEIGHTS = {
    "normal": lambda: torch.randn(96, 256, generator=torch.Generator().manual_seed(0)),
    "small": lambda: torch.randn(3, 64, generator=torch.Generator().manual_seed(1)) * 0.02,
    # More than 256 scales, and their last block is not full.
    "many blocks": lambda: torch.randn(65, 512, generator=torch.Generator().manual_seed(2)),
    "outliers": lambda: torch.randn(64, 128, generator=torch.Generator().manual_seed(3)).pow(5),
    "edges": edges,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WEIGHTS)
def test_equal_to_bitsandbytes(name: str, dtype: torch.dtype) -> None:
    weight = WEIGHTS[name]().to(dtype)
    packed, state = reference.quantize_4bit(
        weight, blocksize=64, quant_type="nf4", compress_statistics=True
    )
    ours = nf4.quantize(weight)
    pairs = nf4.unpack(ours.packed).flatten().view(-1, 2)
    assert torch.equal((pairs[:, 0] << 4) | pairs[:, 1], packed.flatten())
    assert torch.equal(ours.scale_codes.flatten(), state.absmax)
    assert state.state2 is not None and state.offset is not None
    assert torch.equal(ours.scale_scales, state.state2.absmax)
    assert torch.equal(ours.offset, state.offset)
    expected = reference.dequantize_4bit(packed, state)
    assert torch.equal(nf4.dequantize(ours, dtype), expected)


def test_a_model_on_meta_leaves_the_scales_levels_on_the_cpu() -> None:
    """They are made once in a process, maybe while such a model is built."""
    with torch.device("meta"):
        made = nf4.scale_levels.__wrapped__()
    torch.testing.assert_close(made, nf4.scale_levels(), rtol=0, atol=0)


def test_blocks_run_on_where_inputs_are_no_multiple_of_64() -> None:
    """bitsandbytes quantizes [96, 160] so; its CPU build dequantizes only the same numbers in
    rows of 64 with small errors."""
    weight = torch.randn(96, 160, generator=torch.Generator().manual_seed(4))
    packed, state = reference.quantize_4bit(
        weight.reshape(-1, 64), blocksize=64, quant_type="nf4", compress_statistics=True
    )
    ours = nf4.quantize(weight, groups=4)
    expected = reference.dequantize_4bit(packed, state).reshape(weight.shape)
    assert torch.equal(nf4.dequantize(ours, torch.float32), expected)


def test_the_scales_levels_are_those_of_bitsandbytes() -> None:
    assert torch.equal(nf4.scale_levels(), reference.create_dynamic_map())


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_groups_change_the_packing_only(groups: int) -> None:
    weight = WEIGHTS["normal"]()
    ours = nf4.quantize(weight, groups)
    assert ours.packed.shape == (96, groups, 256 // groups // 2)
    plain = nf4.dequantize(nf4.quantize(weight), torch.float32)
    assert torch.equal(nf4.dequantize(ours, torch.float32), plain)


def test_selects_and_lookup_give_equal_levels() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert torch.equal(nf4.level_by_selects(codes), torch.tensor(nf4.LEVELS))
    assert torch.equal(nf4.level_by_lookup(codes), torch.tensor(nf4.LEVELS))


@pytest.mark.parametrize("groups", [2, 4])
def test_a_shard_of_the_inputs_dequantizes_alone(groups: int) -> None:
    weight = WEIGHTS["normal"]()
    whole = nf4.quantize(weight, groups)
    size = 256 // groups
    codes = nf4.unpack(whole.packed)
    for group in range(groups):
        part = nf4.unpack(whole.packed[:, group : group + 1])
        assert torch.equal(part, codes[:, group * size : (group + 1) * size])
