"""Random bits as a pure function of a key and a counter: Threefry-2x32 with 20 rounds.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); jax.random uses the
same function. Written in int32 operations that wrap, so that every backend computes the same bits;
unsigned words are int32 with the same bits. Nothing is stored between calls: the same key and
counter give the same bits on every mesh and after every resume.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor]  # int32 tensors of one shape, or shapes that broadcast

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_FRACTION_BITS = 24


class Position(NamedTuple):
    """The place of a micro-batch in training.

    Attributes:
        seed: int32 scalar, the run's.
        step: int32 scalar, the number of finished updates.
        tokens: int32 [B, S], the number of each token in the step's global batch.
    """

    seed: Tensor
    step: Tensor
    tokens: Tensor


def shifted_right(x: Tensor, by: int) -> Tensor:
    """Return x shifted right, with zeros from the left."""
    # torch_xla 2.9 divides instead, and rounds towards 0: with the lowest bits cleared nothing is
    # rounded. >> keeps the sign, so the bits that it shifts in are cleared too.
    return ((x & -(1 << by)) >> by) & ((1 << (32 - by)) - 1)


def _rotated(x: Tensor, by: int) -> Tensor:
    return (x << by) | shifted_right(x, 32 - by)


def threefry(key: Words, counter: Words) -> Words:
    """Return two words of random bits for each counter."""
    keys = (*key, key[0] ^ key[1] ^ _PARITY)
    x, y = counter[0] + keys[0], counter[1] + keys[1]
    for group in range(5):
        for rotation in _ROTATIONS[group % 2]:
            x = x + y
            y = _rotated(y, rotation) ^ x
        x = x + keys[(group + 1) % 3]
        y = y + keys[(group + 2) % 3] + (group + 1)
    return x, y


def _fractions(key: Words, rows: Tensor, width: int, first: int | Tensor = 0) -> Tensor:
    """Return int32 [*rows.shape, width] from 0 to less than 2^24.

    Args:
        key: two int32 scalars.
        rows: int32, the number of each token; any shape.
        width: entries of a token; entry i of a token has the counter (token, i // 2).
        first: the number of the first entry, if these are only a part of each token's. A tensor
            is even.
    """
    skipped = 0 if isinstance(first, Tensor) else first % 2
    pairs = torch.arange((skipped + width + 1) // 2, dtype=torch.int32, device=rows.device)
    words = torch.stack(threefry(key, (rows[..., None], pairs + first // 2)), dim=-1)
    bits = words.flatten(-2)[..., skipped:][..., :width]
    return shifted_right(bits, 32 - _FRACTION_BITS)


def uniform(key: Words, rows: Tensor, width: int) -> Tensor:
    """Return fp32 [*rows.shape, width] from -1 to less than 1, in steps of 2^-23 and so exact."""
    return _fractions(key, rows, width).float() * 2.0 ** (1 - _FRACTION_BITS) - 1


def kept(
    key: Words, rows: Tensor, width: int, probability: float, first: int | Tensor = 0
) -> Tensor:
    """Return a dropout mask, True where an entry is kept.

    Entries are those of `_fractions`, with the same arguments.

    Args:
        probability: that an entry is dropped, in steps of 2^-24.

    Returns:
        bool [*rows.shape, width].
    """
    fraction = _fractions(key, rows, width, first)
    return fraction >= round(probability * (1 << _FRACTION_BITS))
