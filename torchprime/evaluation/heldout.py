"""Held-out loss: the weighted mean over all supervised tokens, whatever the batching."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from torchprime.data.batch import Batch
from torchprime.data.order import EMPTY_BLOCK
from torchprime.data.packed import PackedDataset


class EvalBackend(Protocol):
    """The part of a backend that a forward needs."""

    def put(self, batch: Batch, accumulation: int) -> Any: ...

    def eval_step(self, batch: Any) -> Any: ...

    def read_eval(self, handles: list[Any]) -> tuple[float, float]: ...


def heldout_loss(backend: EvalBackend, data: PackedDataset, batch_size: int) -> float:
    """Mean loss in nats per supervised token over all blocks.

    Args:
        batch_size: blocks per forward; the last one is filled with empty blocks, so that every
            forward has the shape of the first.
    """
    handles = []
    for start in range(0, data.num_blocks, batch_size):
        indices = np.full(batch_size, EMPTY_BLOCK, dtype=np.int64)
        count = min(batch_size, data.num_blocks - start)
        indices[:count] = np.arange(start, start + count)
        handles.append(backend.eval_step(backend.put(data.batch(indices), 1)))
    loss_sum, weight_sum = backend.read_eval(handles)
    return loss_sum / weight_sum
