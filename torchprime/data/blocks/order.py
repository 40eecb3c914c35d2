"""The blocks of each step: a pure function of (number of blocks, seed, step, batch size).

A schedule of replay has an order of its own (replay.py), made of the same permutations.

No sampler holds state, so a resume only computes the step, and all hosts, devices, meshes and
backends use the same order. Every epoch has its own permutation, from Philox keyed by (seed,
epoch). Only Philox's raw numbers are used, because numpy guarantees their stream.
`Generator.permutation` may change between numpy versions, and two runs could then no longer be
compared.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

EMPTY_BLOCK = -1


def steps_per_epoch(num_blocks: int, global_batch_size: int) -> int:
    """Return the number of updates that see every block once; the last one may be partial."""
    return -(-num_blocks // global_batch_size)


def batch_indices(
    num_blocks: int, seed: int, step: int, global_batch_size: int
) -> npt.NDArray[np.int64]:
    """Return the blocks of the 0-based step; -1 fills the partial last batch of an epoch."""
    if num_blocks < 1 or global_batch_size < 1 or step < 0:
        raise ValueError(
            f"expected num_blocks >= 1, global_batch_size >= 1 and step >= 0, got {num_blocks}, "
            f"{global_batch_size} and {step}"
        )
    epoch, step_in_epoch = divmod(step, steps_per_epoch(num_blocks, global_batch_size))
    first = step_in_epoch * global_batch_size
    chosen = epoch_permutation(num_blocks, seed, epoch)[first : first + global_batch_size]
    indices = np.full(global_batch_size, EMPTY_BLOCK, dtype=np.int64)
    indices[: len(chosen)] = chosen
    return indices


@lru_cache(maxsize=4)
def epoch_permutation(num_blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return all blocks once, sorted by one random number each (shared, so read-only)."""
    # The array sets the key as two words; numpy would split a Python int into words differently.
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    numbers = np.random.Philox(key=key).random_raw(num_blocks)
    permutation = np.argsort(numbers, kind="stable").astype(np.int64)
    permutation.flags.writeable = False
    return permutation
