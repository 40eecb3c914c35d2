"""NEFTune: uniform noise on the embeddings of training (Jain et al. 2023, arXiv:2310.05914).

To each entry of a token's embedding it adds alpha / sqrt(L D) times a number from -1 to 1, with L
the length of the token's example in its block, and D the size of an embedding. The numbers are a
function of seed, step and the token's number in the global batch: mesh, backend, accumulation and
resume do not change them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from torchprime.counter_bits import Position, threefry, uniform

STREAM = -1  # takes the place of a layer's number, which is 0 or more


@contextmanager
def noise_on(embedding: nn.Module, position: Position, scale: Tensor) -> Iterator[None]:
    """Add noise to the module's output, inside the context.

    Args:
        scale: fp32 [B, S], alpha / sqrt(L) of each token, 0 for padding.
    """

    def add(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return out + noise(position, scale, out.shape[-1]).to(out.dtype)

    handle = embedding.register_forward_hook(add)
    try:
        yield
    finally:
        handle.remove()


def noise(position: Position, scale: Tensor, width: int) -> Tensor:
    """Return the noise of tokens, fp32 [B, S, width]."""
    seed, step, tokens = position
    key = threefry((seed, torch.full_like(seed, STREAM)), (step, torch.zeros_like(step)))
    return uniform(key, tokens, width) * (scale[..., None] * (1 / math.sqrt(width)))
