"""A few steps of a backend, its whole tensors, and a state made from them."""

from __future__ import annotations

from typing import Any

import reference
import torch
from torch import Tensor

from torchprime.training.backend import ResumedState

HALF = 2  # steps before the checkpoint, of reference.STEPS


def run(backend: Any, steps: range) -> list:
    return [
        backend.read(
            backend.train_step(
                backend.put(reference.make_batch(step), backend.accumulation), reference.LR
            )
        )
        for step in steps
    ]


def whole(backend: Any) -> dict[str, Tensor]:
    """Every tensor, put together from its chunks; each element must come from exactly one."""
    found: dict[str, Tensor] = {}
    for shards in backend.checkpoint_tensors():
        tensor, written = torch.zeros(shards.shape, dtype=shards.dtype), torch.zeros(shards.shape)
        for (offsets, sizes), chunk in zip(shards.chunks, shards.read(), strict=True):
            place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            assert chunk.shape == sizes
            tensor[place], written[place] = chunk, written[place] + 1
        assert (written == 1).all(), shards.name
        assert shards.name not in found
        found[shards.name] = tensor
    return found


def resumed(tensors: dict[str, Tensor]) -> ResumedState:
    return ResumedState(tensors.__getitem__, HALF)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
