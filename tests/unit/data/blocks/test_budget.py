"""The size of an update, against counts over every batch of an epoch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest

from torchprime.data.blocks.budget import batch_budget
from torchprime.data.blocks.dataset import PackedDataset

REAL = np.array([10, 8, 6, 4, 2])
SUPERVISED = np.array([5, 4, 3, 2, 1])
PACKED = cast(
    PackedDataset,
    SimpleNamespace(
        num_blocks=5, block_size=16, block_real_tokens=REAL, block_supervised_tokens=SUPERVISED
    ),
)


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("seed", [0, 7])
def test_an_epoch_has_every_block_once(batch: int, seed: int) -> None:
    found = batch_budget(PACKED, seed, batch)
    steps = -(-5 // batch)
    assert (found["blocks"], found["block_size"], found["blocks_per_update"]) == (5, 16, batch)
    assert found["steps_per_epoch"] == steps
    assert found["empty_blocks_in_last_update"] == steps * batch - 5
    slots = found["slot_tokens_per_update"]
    assert slots == {"mean": batch * 16, "min": batch * 16, "max": batch * 16}
    for name, counts in (("real", REAL), ("supervised", SUPERVISED)):
        spread = found[f"{name}_tokens_per_update"]
        assert spread["mean"] * steps == pytest.approx(counts.sum())
        assert spread["min"] <= spread["mean"] <= spread["max"]


def test_the_extremes_of_single_blocks_are_theirs() -> None:
    found = batch_budget(PACKED, 3, 1)
    assert found["real_tokens_per_update"] == {"mean": 6.0, "min": 2, "max": 10}
    assert found["supervised_tokens_per_update"] == {"mean": 3.0, "min": 1, "max": 5}
    whole = batch_budget(PACKED, 3, 5)
    assert whole["real_tokens_per_update"] == {"mean": 30.0, "min": 30, "max": 30}
