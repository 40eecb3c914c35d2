"""Rotary embeddings, against transformers' own tables and complex rotation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers
from transformers.models.glm4 import modeling_glm4
from transformers.models.glm4.modeling_glm4 import Glm4RotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3 import modeling_phi3
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from torchprime.models.config_values import ConfigValues
from torchprime.models.rope import RotaryTables, inverse_frequencies, rotary_tables, rotate
from torchprime.models.rope_config import Rope, RopeTraits, read_rope

LLAMA3 = {
    **{"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64},
    **{"low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LONG: dict[str, Any] = {
    **{"rope_type": "longrope", "original_max_position_embeddings": 64},
    "short_factor": [1.0, 1.0, 1.05, 1.1, 1.2, 1.3, 1.5, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 6.0, 8.0, 12.0, 16.0],
}
# Kinds of rope in a Llama with heads of 16 and a context of 512.
WAYS: dict[str, dict[str, Any] | None] = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": LLAMA3,
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": YARN,
    "yarn-mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn-one-mscale": {**YARN, "mscale": 1.2, "mscale_all_dim": 0.0},
    "yarn-attention": {**YARN, "attention_factor": 1.5, "mscale": 1.2, "mscale_all_dim": 0.7},
    "yarn-betas": {**YARN, "beta_fast": 8.0, "beta_slow": 0.5, "truncate": False},
    "yarn-narrow": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0, "truncate": False},
    "yarn-one": {**YARN, "factor": 1.0},
    "longrope": LONG,
    "longrope-factor": {**LONG, "factor": 3.0},
    "longrope-attention": {**LONG, "attention_factor": 1.3},
    "longrope-no-growth": {**LONG, "original_max_position_embeddings": 1024},
}
CONTEXT = 512


def settings(way: str, **more: Any) -> dict[str, Any]:
    return {
        **{"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": CONTEXT},
        **{"rope_theta": 10_000.0, "rope_scaling": WAYS[way]},
        **more,
    }


def config_of(family: str, values: dict[str, Any]) -> Any:
    return transformers.AutoConfig.for_model(family, **copy.deepcopy(values))


def rope_of(values: dict[str, Any], traits: RopeTraits = RopeTraits()) -> Rope:  # noqa: B008
    return read_rope(ConfigValues(copy.deepcopy(values), "config.json"), CONTEXT, traits, 16)


@pytest.mark.parametrize("length", [60, CONTEXT, 700])
@pytest.mark.parametrize("way", WAYS)
def test_tables_are_those_of_transformers(way: str, length: int) -> None:
    """At the lengths of both lists of longrope, and above the context, where dynamic changes."""
    values = settings(way)
    config = config_of("llama", values)
    positions = torch.tensor([[0, 1, 2, length // 2], [0, 1, 0, length - 1]])
    reference = LlamaRotaryEmbedding(config)
    expected_cos, expected_sin = reference(torch.zeros(1), positions)
    ours = RotaryTables(rope_of(values), 16)
    cos, sin = ours(positions, length, torch.float32)
    assert cos.shape == (2, 1, 4, 8)
    # fp32 angles up to 700 are exact to 3e-5.
    torch.testing.assert_close(cos[:, 0], expected_cos[..., :8], rtol=1e-5, atol=5e-5)
    torch.testing.assert_close(sin[:, 0], expected_sin[..., :8], rtol=1e-5, atol=5e-5)
    speeds = torch.tensor(inverse_frequencies(ours.rope, 16, length))
    torch.testing.assert_close(speeds, reference.inv_freq, rtol=1e-6, atol=0)
    assert ours.rope.attention_scale == pytest.approx(reference.attention_scaling, rel=1e-12)


@pytest.mark.parametrize("way", ["default", "longrope"])
@pytest.mark.parametrize("partial", [0.5, 0.75])
def test_a_part_of_a_head_is_rotated_as_in_phi3(way: str, partial: float) -> None:
    scaling = WAYS[way]
    if scaling is not None:
        pairs = int(8 * partial)
        lists = {key: LONG[key][:pairs] for key in ("short_factor", "long_factor")}
        scaling = {"type": "longrope", **lists}
    beside: dict[str, Any] = {
        "partial_rotary_factor": partial,
        "original_max_position_embeddings": 64,
    }
    values = settings("default", **beside) | {"rope_scaling": scaling}
    config = config_of("phi3", values)
    rope = rope_of(values, RopeTraits(partial=1.0))
    positions = torch.tensor([[0, 1, 90]])
    cos, sin = RotaryTables(rope, 16)(positions, 91, torch.float32)
    expected = Phi3RotaryEmbedding(config)(torch.zeros(1), positions)
    q, k = torch.randn(2, 1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    theirs = modeling_phi3.apply_rotary_pos_emb(q, k, *expected)
    torch.testing.assert_close(rotate(q, cos, sin), theirs[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotate(k, cos, sin), theirs[1], rtol=1e-5, atol=1e-5)


def test_neighbours_are_rotated_as_in_glm4() -> None:
    values = settings("default", partial_rotary_factor=0.5, head_dim=16)
    config = config_of("glm4", values)
    rope = rope_of(values, RopeTraits(partial=0.5))
    positions = torch.tensor([[0, 1, 90]])
    cos, sin = RotaryTables(rope, 16)(positions, 91, torch.float32)
    expected = Glm4RotaryEmbedding(config)(torch.zeros(1), positions)
    q, k = torch.randn(2, 1, 2, 3, 16, generator=torch.Generator().manual_seed(0))
    theirs = modeling_glm4.apply_rotary_pos_emb(q, k, *expected)[0]
    found = rotate(q, cos, sin, neighbours=True)
    torch.testing.assert_close(found, theirs, rtol=1e-5, atol=1e-5)


def test_llama3_leaves_fast_speeds_and_slows_slow_ones() -> None:
    plain = inverse_frequencies(Rope(500_000.0), 16)
    scaled = inverse_frequencies(Rope(500_000.0, "llama3", 8.0, 1.0, 4.0, 64), 16)
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
