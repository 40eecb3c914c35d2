"""The size of one update, known before compilation: its blocks and tokens over one epoch."""

from __future__ import annotations

from functools import partial
from typing import TypedDict

import numpy as np

from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.order import EMPTY_BLOCK, batch_indices, steps_per_epoch
from torchprime.data.blocks.replay import ReplayOrder


class Spread(TypedDict):
    """Mean, minimum and maximum of a number of tokens over the updates of an epoch."""

    mean: float
    min: int
    max: int


class Budget(TypedDict):
    """The size of one update over an epoch.

    `blocks` counts all blocks of the data, `block_size` the tokens of one, and `blocks_per_update`
    is the global batch size. An epoch's last update is filled up with empty blocks. Slots are the
    tokens of all blocks with their padding. With a schedule of replay the numbers are over the run,
    no update has empty blocks, and an epoch is a pass over the blocks that are not replay.
    """

    blocks: int
    block_size: int
    blocks_per_update: int
    steps_per_epoch: int
    empty_blocks_in_last_update: int
    slot_tokens_per_update: Spread
    real_tokens_per_update: Spread
    supervised_tokens_per_update: Spread


def batch_budget(
    packed: PackedDataset, seed: int, global_batch_size: int, replay: ReplayOrder | None = None
) -> Budget:
    """Return mean, min and max of slot, real and supervised tokens per update of an epoch, or of
    the run with a schedule of replay."""
    if replay is None:
        steps = steps_per_epoch(packed.num_blocks, global_batch_size)
        empty = steps * global_batch_size - packed.num_blocks
        of_step = partial(
            batch_indices, packed.num_blocks, seed, global_batch_size=global_batch_size
        )
        counted = range(steps)
    else:
        steps, empty = replay.steps_per_epoch, 0
        of_step, counted = replay.blocks, range(replay.total_steps)
    real, supervised = [], []
    for indices in map(of_step, counted):
        blocks = indices[indices != EMPTY_BLOCK]
        real.append(int(packed.block_real_tokens[blocks].sum()))
        supervised.append(int(packed.block_supervised_tokens[blocks].sum()))
    slots = global_batch_size * packed.block_size
    return {
        "blocks": packed.num_blocks,
        "block_size": packed.block_size,
        "blocks_per_update": global_batch_size,
        "steps_per_epoch": steps,
        "empty_blocks_in_last_update": empty,
        "slot_tokens_per_update": {"mean": float(slots), "min": slots, "max": slots},
        "real_tokens_per_update": _summary(real),
        "supervised_tokens_per_update": _summary(supervised),
    }


def _summary(values: list[int]) -> Spread:
    return {"mean": float(np.mean(values)), "min": min(values), "max": max(values)}
