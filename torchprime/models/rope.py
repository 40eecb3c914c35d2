"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with long-context scaling.

The tables are made once per forward from position_ids, outside the layers, and passed to every
layer: segments restart their positions, so the tables are per batch element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchprime.models.rope_config import Rope


def inverse_frequencies(rope: Rope, head_dim: int) -> list[float]:
    """Return the head_dim/2 rotation speeds in radians per position, in double precision.

    `linear` divides all of them by the factor (position interpolation, arXiv:2306.15595). `llama3`
    divides only the slow ones and interpolates in between by wavelength, as Llama 3.1's reference
    code does.
    """
    plain = [rope.theta ** (-i / head_dim) for i in range(0, head_dim, 2)]
    if rope.kind == "default":
        return plain
    if rope.kind == "linear":
        return [f / rope.factor for f in plain]
    return [_llama3_scaled(f, rope) for f in plain]


def _llama3_scaled(frequency: float, rope: Rope) -> float:
    wavelength = 2 * math.pi / frequency
    rotations = rope.original_max_position / wavelength
    if rotations < rope.low_freq_factor:
        return frequency / rope.factor
    if rotations > rope.high_freq_factor:
        return frequency
    smooth = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def rotary_tables(
    speeds: Tensor, position_ids: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for each position, computed in fp32.

    Args:
        speeds: `inverse_frequencies` as fp32 [head_dim/2], on the device of the positions.
        position_ids: integers [B, S].
        dtype: of the result; angles are always fp32, since bf16 cannot hold a position above 256.

    Returns:
        cos and sin, each [B, 1, S, head_dim/2], to broadcast over heads.
    """
    angles = position_ids.to(torch.float32)[:, None, :, None] * speeds
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of each head vector, x [B, H, S, h], by the angles of its position."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
