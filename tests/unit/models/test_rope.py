"""Rotary embeddings, against transformers' own tables and complex rotation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from torchprime.models.rope import inverse_frequencies, rotary_tables, rotate
from torchprime.models.rope_config import Rope

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
WAYS = {
    "default": (Rope(10_000.0), None),
    "linear": (Rope(10_000.0, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
    "llama3": (Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 64), LLAMA3),
}


@pytest.mark.parametrize("way", WAYS)
def test_tables_are_those_of_transformers(way: str) -> None:
    rope, scaling = WAYS[way]
    values: dict[str, Any] = {
        **{"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 512},
        **{"rope_theta": rope.theta, "rope_scaling": scaling},
    }
    config = transformers.LlamaConfig(**values)
    positions = torch.tensor([[0, 1, 2, 300], [0, 1, 0, 511]])
    expected_cos, expected_sin = LlamaRotaryEmbedding(config)(torch.zeros(1), positions)
    speeds = torch.tensor(inverse_frequencies(rope, 16))
    cos, sin = rotary_tables(speeds, positions, torch.float32)
    assert cos.shape == (2, 1, 4, 8)
    torch.testing.assert_close(cos[:, 0], expected_cos[..., :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin[:, 0], expected_sin[..., :8], rtol=1e-5, atol=1e-5)


def test_llama3_leaves_fast_speeds_and_slows_slow_ones() -> None:
    plain = inverse_frequencies(Rope(500_000.0), 16)
    scaled = inverse_frequencies(WAYS["llama3"][0], 16)
    shares = [new / old for new, old in zip(scaled, plain, strict=True)]
    assert shares[0] == 1.0 and shares[-1] == pytest.approx(1 / 8)
    assert shares == sorted(shares, reverse=True)


def test_rotation_is_a_product_of_complex_numbers() -> None:
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angles = torch.linspace(0, 6, 2 * 5 * 4, dtype=torch.float64).reshape(2, 1, 5, 4)
    product = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angles), angles)
    found = rotate(x, angles.cos(), angles.sin())
    torch.testing.assert_close(found, torch.cat([product.real, product.imag], -1))


def test_angles_are_fp32_even_for_bf16_tables() -> None:
    positions = torch.tensor([[1001]])  # bf16 would round it to 1000
    speeds = torch.tensor([1.0])
    cos, _ = rotary_tables(speeds, positions, torch.bfloat16)
    assert cos.dtype == torch.bfloat16
    assert cos.item() == torch.tensor(1001.0).cos().bfloat16().item()
