"""Rotary position embeddings (Su et al. 2021, arXiv:2104.09864), with long-context scaling.

The tables are made once per forward from position_ids, outside the layers, and passed to every
layer: segments restart their positions, so the tables are per batch element.

Two kinds of scaling depend on the length of the sequence. Here that is the number of positions that
the program's shapes have room for: a block's length in training, prompt and answer in generation.
So rows, micro-batches and packing do not change the model.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from torchprime.models.rope_config import Rope


class RotaryTables(nn.Module):
    """Maker of the tables of cosines and sines of a rope.

    Its frequencies are constants, not weights: they are on the CPU even if the parameters are made
    without storage, and checkpoints do not have them.

    Args:
        growth: `Rope.query_growth` in tables that are for queries only.
    """

    def __init__(self, rope: Rope, head_dim: int, growth: float | None = None) -> None:
        super().__init__()
        self.rope, self.head_dim, self.growth = rope, head_dim, growth
        self.speeds: Tensor
        self.register_buffer("speeds", self._of_length(0), persistent=False)
        self.long_speeds: Tensor | None
        longer = self._of_length(rope.original_max_position + 1) if rope.long_factor else None
        self.register_buffer("long_speeds", longer, persistent=False)

    def _of_length(self, length: int) -> Tensor:
        speeds = inverse_frequencies(self.rope, self.head_dim, length)
        return torch.tensor(speeds, dtype=torch.float32, device="cpu")

    def forward(
        self, position_ids: Tensor, length: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of each position, times the rope's factor of attention.

        Args:
            position_ids: integers [B, S].
            length: of the sequence that they are a part of.
            dtype: of the result.
        """
        speeds = self.speeds
        if length > self.rope.original_max_position:
            if self.long_speeds is not None:
                speeds = self.long_speeds
            elif self.rope.kind == "dynamic":
                speeds = self._of_length(length).to(position_ids.device)
        cos, sin = rotary_tables(speeds, position_ids, torch.float32, self.rope.attention_scale)
        if self.growth is not None:
            contexts = torch.floor(position_ids.float() / self.rope.original_max_position)
            scale = 1 + self.growth * torch.log(1 + contexts)[:, None, :, None]
            cos, sin = cos * scale, sin * scale
        return cos.to(dtype), sin.to(dtype)


def inverse_frequencies(rope: Rope, head_dim: int, length: int = 0) -> list[float]:
    """Return the rotation speeds of a head's pairs in radians per position, in double precision.

    - `linear` divides all of them by the factor (position interpolation, arXiv:2306.15595).
    - `dynamic` raises the base for a length above the context (NTK-aware scaling).
    - `llama3` divides only the slow ones and interpolates in between by wavelength, as Llama 3.1's
      reference code does.
    - `yarn` does the same by the number of rotations in the original context (arXiv:2309.00071).
    - `longrope` divides each by a factor that was searched for (arXiv:2402.13753).

    Args:
        length: of the sequence, for `dynamic` and `longrope`.
    """
    size, theta = rope.rotated(head_dim), rope.theta
    if rope.kind == "dynamic" and length > rope.original_max_position:
        growth = rope.factor * length / rope.original_max_position - (rope.factor - 1)
        theta *= growth ** (size / (size - 2))
    plain = [theta ** (-i / size) for i in range(0, size, 2)]
    if rope.kind == "linear":
        return [f / rope.factor for f in plain]
    if rope.kind == "llama3":
        return [_llama3_scaled(f, rope) for f in plain]
    if rope.kind == "yarn":
        return _yarn_scaled(plain, rope)
    if rope.kind == "longrope":
        factors = rope.long_factor if length > rope.original_max_position else rope.short_factor
        return [f / factor for f, factor in zip(plain, factors, strict=True)]
    return plain


def _llama3_scaled(frequency: float, rope: Rope) -> float:
    wavelength = 2 * math.pi / frequency
    rotations = rope.original_max_position / wavelength
    if rotations < rope.low_freq_factor:
        return frequency / rope.factor
    if rotations > rope.high_freq_factor:
        return frequency
    smooth = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return (1 - smooth) * frequency / rope.factor + smooth * frequency


def _yarn_scaled(plain: list[float], rope: Rope) -> list[float]:
    """Return the speeds between those of pairs that stay and pairs that are divided by the factor,
    by a ramp over the pairs' numbers."""
    size = 2 * len(plain)

    def pair_with(rotations: float) -> float:
        """Return the number of the pair that rotates so often in the original context."""
        wavelength = rope.original_max_position / rotations / (2 * math.pi)
        return size * math.log(wavelength) / (2 * math.log(rope.theta))

    low, high = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, size - 1)
    width = high - low or 0.001
    shares = [min(max((pair - low) / width, 0.0), 1.0) for pair in range(len(plain))]
    return [
        f * (1 - share) + f / rope.factor * share for f, share in zip(plain, shares, strict=True)
    ]


def rotary_tables(
    speeds: Tensor, position_ids: Tensor, dtype: torch.dtype, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return cosines and sines for each position, computed in fp32.

    Args:
        speeds: `inverse_frequencies` as fp32 [pairs], on the device of the positions.
        position_ids: integers [B, S].
        dtype: of the result; angles are always fp32, since bf16 cannot hold a position above 256.
        scale: a factor of both.

    Returns:
        cos and sin, each [B, 1, S, pairs], to broadcast over heads.
    """
    angles = position_ids.to(torch.float32)[:, None, :, None] * speeds
    cos, sin = angles.cos(), angles.sin()
    if scale != 1:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype), sin.to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, neighbours: bool = False) -> Tensor:
    """Rotate pairs of numbers of each head vector, x [B, H, S, h], by the angles of its position.

    Tables with fewer pairs than a head has rotate its first part and leave the rest.

    Args:
        neighbours: a pair is two neighbours (GLM); otherwise one number of each half (Llama).
    """
    pairs = cos.shape[-1]
    part, rest = (
        (x, None)
        if 2 * pairs == x.shape[-1]
        else x.split([2 * pairs, x.shape[-1] - 2 * pairs], dim=-1)
    )
    if neighbours:
        first, second = part.unflatten(-1, (pairs, 2)).unbind(-1)
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
        part = turned.flatten(-2)
    else:
        first, second = part.chunk(2, dim=-1)
        part = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return part if rest is None else torch.cat([part, rest], dim=-1)
