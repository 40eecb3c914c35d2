"""Held-out loss: the weighted mean over all supervised tokens, independent of the batching."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

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


LogprobsOf = Callable[[Sequence[Sequence[int]]], list[list[float]]]


def loss_by_logprobs(logprobs_of: LogprobsOf, data: PackedDataset, batch_size: int) -> HeldoutLoss:
    """Return the same mean as `heldout_loss`, of an engine that scores whole sequences.

    Args:
        logprobs_of: from token ids to the log-probabilities, in nats, of all of each but the first.
        batch_size: blocks whose sequences are scored at a time.
    """
    names = data.source_names
    losses, weights = np.zeros(len(names)), np.zeros(len(names))
    for start in range(0, data.num_blocks, batch_size):
        blocks = np.arange(start, min(start + batch_size, data.num_blocks), dtype=np.int64)
        pieces = list(_scored_pieces(data.batch(blocks)))
        for piece, logprobs in zip(pieces, logprobs_of([p.ids for p in pieces]), strict=True):
            losses[piece.source] -= float(np.dot(piece.weights, np.asarray(logprobs)))
            weights[piece.source] += float(piece.weights.sum())
    by_source = None
    if len(names) > 1:
        sums = zip(names, losses.tolist(), weights.tolist(), strict=True)
        by_source = {name: loss / weight if weight else None for name, loss, weight in sums}
    return HeldoutLoss(float(losses.sum() / weights.sum()), by_source)


class _Piece(NamedTuple):
    """A segment up to its last target: ids, and the weight of each but the first."""

    ids: list[int]
    weights: npt.NDArray[np.float64]
    source: int


def _scored_pieces(batch: Batch) -> Iterator[_Piece]:
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, int(segments.max()) + 1):
            places = np.flatnonzero(segments == segment)
            weights = batch.loss_weights[row, places].astype(np.float64)
            used = np.flatnonzero(weights > 0)
            if not len(used):
                continue
            end = int(used[-1]) + 1  # tokens that predict; the last target follows them
            ids = [*batch.input_ids[row, places[:end]], batch.targets[row, places[end - 1]]]
            sources = batch.source_ids
            source = 0 if sources is None else int(sources[row, places[0]])
            yield _Piece(list(map(int, ids)), weights[:end], source)


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
