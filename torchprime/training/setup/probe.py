"""A test that segments of a block do not attend to each other, with the run's own model and kernel.

In every block one segment's tokens are changed, and the losses of all other segments' tokens are
computed before and after by the run's own held-out step. Attention within segments leaves them
bitwise equal: a masked key enters the softmax as an exact zero. A control guards
against a probe that can't fail: the changed segment's own loss has to change.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.order import EMPTY_BLOCK
from torchprime.data.tokens.completions import IGNORED
from torchprime.errors import IsolationError
from torchprime.evaluation.heldout import EvalBackend

Mask = npt.NDArray[np.bool_]


def probe_isolation(
    backend: EvalBackend, data: PackedDataset, batch_size: int, vocab_size: int
) -> str:
    """Prove on the device that the segments of `data`'s blocks are isolated.

    Args:
        batch_size: blocks per forward, that of the held-out step, whose program is used.

    Returns:
        A line that reports the result.

    Raises:
        IsolationError: another segment's loss changed, or the changed one's did not.
    """
    several = np.flatnonzero(np.diff(data.plan.starts) > 1)[:batch_size]
    if not len(several):
        return "isolation    nothing to prove: no block holds two segments"
    indices = np.full(batch_size, EMPTY_BLOCK, dtype=np.int64)
    indices[: len(several)] = several
    batch = _predict_everything(data.batch(indices))
    segments = batch.segment_ids
    last = segments.max(axis=1, keepdims=True)
    others_seen = 0
    for changed in (segments == 1, (segments == last) & (segments > 0)):
        new_ids = np.where(changed, (batch.input_ids + 1) % vocab_size, batch.input_ids)
        other = replace(batch, input_ids=new_ids.astype(np.int32))
        others, own = (segments > 0) & ~changed, changed
        before, after = (_loss(backend, b, others) for b in (batch, other))
        if not math.isfinite(before):  # the training step reports it, with the batch
            return f"isolation    not proved: the loss of the probe's blocks is {before}"
        if before != after:
            raise IsolationError(
                "Segments of a packed block see each other: after changing one segment's tokens "
                f"the loss of the others went from {before!r} to {after!r} nats. Use another "
                "model.attention_kernel (reference is exact), or dataset.packing=none; "
                "isolation_probe=false trains all the same."
            )
        predicts = bool((batch.loss_weights[own] > 0).any())
        if predicts and _loss(backend, batch, own) == _loss(backend, other, own):
            raise IsolationError(
                "The isolation probe proves nothing here: changing a segment's tokens did not "
                "change that segment's own loss. Check the model's weights; isolation_probe=false "
                "leaves the probe out."
            )
        others_seen += int(others.sum())
    return (
        f"isolation    proved on {len(several)} blocks: with one segment's tokens changed, the "
        f"loss of {others_seen:,} tokens of other segments did not move by a bit"
    )


def _predict_everything(batch: Batch) -> Batch:
    """Return the batch with every token predicting the next one of its segment, whatever is
    supervised."""
    targets = np.full_like(batch.targets, IGNORED)
    same = (batch.segment_ids[:, 1:] == batch.segment_ids[:, :-1]) & (batch.segment_ids[:, 1:] > 0)
    targets[:, :-1] = np.where(same, batch.input_ids[:, 1:], IGNORED)
    weights = (targets != IGNORED).astype(np.float32)
    return replace(batch, targets=targets, loss_weights=weights, source_ids=None)


def _loss(backend: EvalBackend, batch: Batch, where: Mask) -> float:
    """Return the summed loss of some tokens."""
    weights = np.where(where, batch.loss_weights, 0.0).astype(np.float32)
    chosen = replace(batch, loss_weights=weights)
    return backend.read_eval([backend.eval_step(backend.put(chosen, 1))])[0]
