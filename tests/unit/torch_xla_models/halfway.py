"""A few steps of a backend, its whole tensors, and a state made from them."""

from __future__ import annotations

from collections.abc import Sequence
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
    """Every tensor, put together from its chunks."""
    return together([chunks_of(backend)])


def chunks_of(backend: Any) -> list[tuple]:
    """Of every tensor: name, shape, dtype, and the chunks that this process writes."""
    return [
        (s.name, s.shape, s.dtype, list(zip(s.chunks, s.read(), strict=True)))
        for s in backend.checkpoint_tensors()
    ]


def together(processes: Sequence[list[tuple]]) -> dict[str, Tensor]:
    """Every tensor from all processes' chunks; each element must come from exactly one."""
    found: dict[str, Tensor] = {}
    for lists in zip(*processes, strict=True):
        name, shape, dtype = lists[0][:3]
        tensor, written = torch.zeros(shape, dtype=dtype), torch.zeros(shape)
        for (offsets, sizes), chunk in (each for mine in lists for each in mine[3]):
            place = tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))
            assert chunk.shape == sizes
            tensor[place], written[place] = chunk, written[place] + 1
        assert (written == 1).all(), name
        assert name not in found
        found[name] = tensor
    return found


def resumed(tensors: dict[str, Tensor]) -> ResumedState:
    def tensor_of(name: str, region: tuple[list[int], list[int]] | None = None) -> Tensor:
        if region is None:
            return tensors[name]
        return tensors[name][tuple(slice(at, at + n) for at, n in zip(*region, strict=True))]

    return ResumedState(tensor_of, HALF)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
