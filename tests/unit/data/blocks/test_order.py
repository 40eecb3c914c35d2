"""The order is a pure function of its four arguments, and its stream is Philox's own."""

from __future__ import annotations

import numpy as np
import pytest

from torchprime.data.blocks.order import batch_indices, epoch_permutation, steps_per_epoch

MASK = 2**64 - 1


def philox_numbers(key: tuple[int, int], count: int) -> list[int]:
    """Philox4x64-10 from its paper (Salmon et al. 2011), counting from 1 as numpy does."""
    numbers: list[int] = []
    for block in range(1, -(-count // 4) + 1):
        x, k = [block, 0, 0, 0], list(key)
        for _ in range(10):
            high0, low0 = divmod(0xD2E7470EE14C6C93 * x[0], 2**64)
            high1, low1 = divmod(0xCA5A826395121157 * x[2], 2**64)
            x = [high1 ^ x[1] ^ k[0], low1, high0 ^ x[3] ^ k[1], low0]
            k = [(k[0] + 0x9E3779B97F4A7C15) & MASK, (k[1] + 0xBB67AE8584CAA73B) & MASK]
        numbers += x
    return numbers[:count]


def epoch_of_blocks(num_blocks: int, seed: int, epoch: int, batch: int) -> list[int]:
    steps = steps_per_epoch(num_blocks, batch)
    indices = [batch_indices(num_blocks, seed, epoch * steps + i, batch) for i in range(steps)]
    return np.concatenate(indices).tolist()


@pytest.mark.parametrize(("seed", "epoch"), [(42, 0), (42, 3), (0, 1), (-1, 0)])
def test_permutation_is_the_argsort_of_philox(seed: int, epoch: int) -> None:
    numbers = philox_numbers((seed & MASK, epoch), 101)
    expected = sorted(range(101), key=lambda i: numbers[i])
    assert epoch_permutation(101, seed, epoch).tolist() == expected


@pytest.mark.parametrize("batch", [1, 7, 10, 64, 100])
def test_every_block_once_per_epoch_and_last_batch_filled(batch: int) -> None:
    for epoch in range(3):
        seen = epoch_of_blocks(64, 42, epoch, batch)
        assert sorted(i for i in seen if i >= 0) == list(range(64))
        filler = len(seen) - 64
        assert seen[64:] == [-1] * filler
        assert filler < batch


def test_epochs_and_seeds_differ() -> None:
    orders = {
        tuple(epoch_of_blocks(50, seed, epoch, 10)) for seed in (0, 1, 42) for epoch in range(4)
    }
    assert len(orders) == 12


def test_independent_of_what_was_asked_before_and_of_global_state() -> None:
    forward = [batch_indices(33, 7, step, 4).tolist() for step in range(30)]
    epoch_permutation.cache_clear()
    np.random.seed(0)
    backward = [batch_indices(33, 7, step, 4).tolist() for step in reversed(range(30))]
    assert forward == backward[::-1]


def test_an_epoch_order_does_not_depend_on_the_batch_size() -> None:
    small = [i for i in epoch_of_blocks(33, 7, 2, 4) if i >= 0]
    large = [i for i in epoch_of_blocks(33, 7, 2, 16) if i >= 0]
    assert small == large


def test_result_can_be_changed_without_changing_the_order() -> None:
    first = batch_indices(8, 1, 0, 8)
    kept = first.copy()
    first[:] = 0
    assert batch_indices(8, 1, 0, 8).tolist() == kept.tolist()


def test_steps_and_epochs() -> None:
    assert [steps_per_epoch(n, 4) for n in (1, 4, 5, 8)] == [1, 1, 2, 2]


@pytest.mark.parametrize("arguments", [(0, 1, 0, 1), (1, 1, -1, 1), (1, 1, 0, 0)])
def test_impossible_arguments(arguments: tuple[int, int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected num_blocks >= 1"):
        batch_indices(*arguments)
