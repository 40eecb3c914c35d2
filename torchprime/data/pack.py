"""Which examples share a block: a plan made from lengths alone, deterministic.

First-fit decreasing, seen from the block: take the longest example left, then again the longest
that still fits, until none does. One thing is better than first fit: the last two places of a
block are filled together, by the pair that leaves the least room, because the longest example
that fits often leaves a gap no other fits into (GSM8K with a Qwen tokenizer, blocks of 1024:
98.5% of slots real without, 99.9% with).

Examples of equal length are interchangeable, so the work is done on a histogram: the lengths found
for one block are repeated for as many blocks as the counts allow, and a million examples need no
more decisions than there are lengths.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchprime.errors import DataError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Plan:
    """Block b holds the examples `order[starts[b]:starts[b + 1]]`, in that order."""

    order: Ints
    starts: Ints

    @property
    def num_blocks(self) -> int:
        return len(self.starts) - 1


def pack(lengths: Ints, block_size: int, packing: str) -> Plan:
    """Assign every example to one block; lengths must not exceed the block size."""
    lengths = np.asarray(lengths, dtype=np.int64)
    assert len(lengths) and lengths.min() > 0 and lengths.max() <= block_size
    if packing == "none":
        return Plan(np.arange(len(lengths)), np.arange(len(lengths) + 1))
    if packing != "first_fit":
        raise DataError(f"dataset.packing={packing} is not known, expected none or first_fit")
    sizes, counts = np.unique(lengths, return_counts=True)
    blocks = _block_fills(sizes, counts, block_size)
    # Every place in a block asks for a length; places and examples, both sorted by length and
    # then by order of appearance, belong together one to one.
    places = np.concatenate([np.tile(fill, times) for fill, times in blocks])
    order = np.empty(len(lengths), dtype=np.int64)
    order[np.argsort(places, kind="stable")] = np.argsort(lengths, kind="stable")
    per_block = np.concatenate([np.full(times, len(fill)) for fill, times in blocks])
    return Plan(order, np.concatenate([[0], np.cumsum(per_block)]))


def _block_fills(sizes: Ints, counts: Ints, block_size: int) -> list[tuple[list[int], int]]:
    """(lengths in one block, how many such blocks), until every count is used up.

    `sizes` ascend. Lengths whose count is 0 are removed, so that a search sees only what is left.
    """
    fills: list[tuple[list[int], int]] = []
    counts = counts.copy()
    while len(sizes):
        fill = _fill_one(sizes, counts, block_size)
        uses = Counter(fill)
        used = np.searchsorted(sizes, list(uses))
        times = int((counts[used] // list(uses.values())).min())
        counts[used] -= times * np.array(list(uses.values()))
        fills.append((fill, times))
        if not counts[used].all():
            sizes, counts = sizes[counts > 0], counts[counts > 0]
    return fills


def _fill_one(sizes: Ints, counts: Ints, block_size: int) -> list[int]:
    """The lengths for one block, long to short but for what fits after the finishing pair."""
    left = counts.copy()
    fill: list[int] = []
    room = block_size
    while True:
        left_over = np.flatnonzero(left[: np.searchsorted(sizes, room, side="right")])
        if not len(left_over):
            return fill
        longest = int(left_over[-1])
        chosen = [longest]
        if fill and room <= 2 * sizes[longest]:
            chosen = _finish(sizes[left_over], left[left_over], room, left_over)
        for index in chosen:
            left[index] -= 1
            fill.append(int(sizes[index]))
            room -= int(sizes[index])


def _finish(fitting: Ints, left: Ints, room: int, indices: Ints) -> list[int]:
    """The one or two of the `fitting` lengths that leave the least room; two only if better."""
    partner = np.searchsorted(fitting, room - fitting, side="right") - 1
    # A length may not be paired with itself when one example is left; the next shorter is then
    # the best that remains.
    alone = (partner == np.arange(len(fitting))) & (left == 1)
    partner = partner - alone
    total = np.where(partner >= 0, fitting + fitting[partner], 0)
    if total.max() <= fitting[-1]:
        return [int(indices[-1])]
    # Of the pairs that fill best, the one of which most are left. Taking any pair would use up
    # the short examples, or the long ones, and leave blocks at the end that nothing completes.
    best = np.flatnonzero(total == total.max())
    plenty = np.minimum(left[best], left[partner[best]])
    chosen = int(best[np.argmax(plenty)])
    return [int(indices[chosen]), int(indices[partner[chosen]])]
