"""Random bits as a pure function of a key and a counter: Threefry-2x32 with 20 rounds.

Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011); jax.random uses the
same function. Written in int32 operations that wrap, so that every backend computes the same bits;
unsigned words are int32 with the same bits. Nothing is stored between calls: the same key and
counter give the same bits on every mesh and after every resume.
"""

from __future__ import annotations

import torch
from torch import Tensor

Words = tuple[Tensor, Tensor]  # int32 tensors of one shape, or shapes that broadcast

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_FRACTION_BITS = 24


def _shifted_right(x: Tensor, by: int) -> Tensor:
    """Return x shifted right, with zeros from the left."""
    # torch_xla 2.9 divides instead, and rounds towards 0: with the lowest bits cleared nothing is
    # rounded. >> keeps the sign, so the bits that it shifts in are cleared too.
    return ((x & -(1 << by)) >> by) & ((1 << (32 - by)) - 1)


def _rotated(x: Tensor, by: int) -> Tensor:
    return (x << by) | _shifted_right(x, 32 - by)


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


def kept(key: Words, rows: Tensor, width: int, probability: float, first: int = 0) -> Tensor:
    """Return a dropout mask, True where an entry is kept.

    Args:
        key: two int32 scalars.
        rows: int32, the number of each token; any shape.
        width: entries of a token; entry i of a token has the counter (token, i // 2).
        probability: that an entry is dropped, in steps of 2^-24.
        first: the number of the first entry, if these are only a part of each token's.

    Returns:
        bool [*rows.shape, width].
    """
    end = (first + width + 1) // 2
    pairs = torch.arange(first // 2, end, dtype=torch.int32, device=rows.device)
    words = torch.stack(threefry(key, (rows[..., None], pairs)), dim=-1)
    bits = words.flatten(-2)[..., first % 2 :][..., :width]
    fraction = _shifted_right(bits, 32 - _FRACTION_BITS)
    return fraction >= round(probability * (1 << _FRACTION_BITS))
