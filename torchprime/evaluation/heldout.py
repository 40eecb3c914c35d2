"""Held-out loss: the weighted mean over all supervised tokens, independent of the batching."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.order import EMPTY_BLOCK


class EvalBackend(Protocol):
    """The part of a backend that a forward pass needs."""

    def put(self, batch: Batch, accumulation: int) -> Any: ...

    def eval_step(self, batch: Any, num_sources: int = 1) -> Any: ...

    def read_eval(self, handles: list[Any]) -> tuple[float, ...]: ...


class HeldoutLoss(NamedTuple):
    """Loss in nats per supervised token; by source if there are several, None for a source without
    any."""

    mean: float
    by_source: dict[str, float | None] | None


def heldout_loss(backend: EvalBackend, data: PackedDataset, batch_size: int) -> HeldoutLoss:
    """Return the mean loss over all blocks: the sum over their tokens, divided once.

    Args:
        batch_size: blocks per forward; the last one is filled with empty blocks, so that every
            forward has the shape of the first.
    """
    names = data.source_names
    handles, weights = [], np.zeros(len(names))
    for start in range(0, data.num_blocks, batch_size):
        indices = np.full(batch_size, EMPTY_BLOCK, dtype=np.int64)
        count = min(batch_size, data.num_blocks - start)
        indices[:count] = np.arange(start, start + count)
        batch = data.batch(indices)
        weights += batch.source_weights(len(names)) or 0.0
        handles.append(backend.eval_step(backend.put(batch, 1), len(names)))
    loss_sum, weight_sum, *sums = backend.read_eval(handles)
    by_source = None
    if len(names) > 1:
        trios = zip(names, sums, weights.tolist(), strict=True)
        by_source = {name: total / weight if weight else None for name, total, weight in trios}
    return HeldoutLoss(loss_sum / weight_sum, by_source)
