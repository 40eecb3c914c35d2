"""The blocks of each step when the share of replay follows a schedule over the run.

    own blocks, replay blocks  +  share of each step  ->  the blocks of each step

The blocks are apart: each holds own examples or replay examples only. Own and replay blocks have
epochs of their own, each with its permutation, so no update has an empty block. Before each block
the order takes the kind that brings the supervised tokens of replay so far closest to their share.
So the tokens of any window of blocks differ from the share by less than those of one block.

The order is a pure function of seed, schedule, length of the run, batch size and the tokens of the
blocks. No checkpoint holds a state of it, and no mesh changes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from torchprime.config.sections.dataset import ReplayShape
from torchprime.data.blocks.order import epoch_permutation, steps_per_epoch

Ints = npt.NDArray[np.int64]

PARTS = 10**9  # a share is a whole number of these parts, so that sums of tokens are exact
REPLAY_EPOCHS = 2**63  # own and replay blocks have different permutations


@dataclass(frozen=True)
class ReplaySchedule:
    """The share of replay among the supervised tokens, from the first step to the last."""

    start: float
    end: float
    shape: ReplayShape

    def share(self, step: int, total_steps: int) -> float:
        """Return the share at a 0-based step."""
        done = step / (total_steps - 1) if total_steps > 1 else 0.0
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done


class ReplayPlan(TypedDict):
    """A schedule in numbers: its own, and what follows from them.

    `share` is the share of the supervised tokens over the run. A pass sees each block of a kind
    once.
    """

    start: float
    end: float
    shape: str
    share: float
    blocks: int
    passes: float
    own_passes: float


class ReplayOrder:
    """The blocks of every step of a run.

    Args:
        tokens: the supervised tokens of each block.
        is_replay: the blocks that hold replay examples.
    """

    def __init__(
        self,
        tokens: Ints,
        is_replay: npt.NDArray[np.bool_],
        schedule: ReplaySchedule,
        *,
        seed: int,
        global_batch_size: int,
        total_steps: int,
    ) -> None:
        self.schedule, self.global_batch_size = schedule, global_batch_size
        self.total_steps = total_steps
        self.own, self.replay = np.flatnonzero(~is_replay), np.flatnonzero(is_replay)
        pools = _Pool(self.own, tokens, seed, 0), _Pool(self.replay, tokens, seed, REPLAY_EPOCHS)
        shares = (schedule.share(step, total_steps) for step in range(total_steps))
        chosen = _sequence(*pools, [round(PARTS * share) for share in shares], global_batch_size)
        self._blocks = np.fromiter(chosen, np.int64, total_steps * global_batch_size)
        self._is_replay, self._tokens = is_replay[self._blocks], tokens[self._blocks]

    def blocks(self, step: int) -> Ints:
        """Return the blocks of the 0-based step."""
        size = self.global_batch_size
        return self._blocks[step * size : (step + 1) * size]

    def own_passes(self, steps: int) -> float:
        """Return the passes over the own blocks in the first so many steps: the epochs."""
        return float((~self._is_replay[: steps * self.global_batch_size]).sum() / len(self.own))

    @property
    def steps_per_epoch(self) -> int:
        """The steps of a pass over the own blocks, rounded, at the run's mean pace."""
        passes = self.own_passes(self.total_steps)
        if not passes:
            return steps_per_epoch(len(self.own), self.global_batch_size)
        return max(1, round(self.total_steps / passes))

    def plan(self) -> ReplayPlan:
        """Return the schedule in numbers."""
        total = int(self._tokens.sum())
        return {
            "start": self.schedule.start,
            "end": self.schedule.end,
            "shape": self.schedule.shape,
            "share": int(self._tokens[self._is_replay].sum()) / total if total else 0.0,
            "blocks": len(self.replay),
            "passes": float(self._is_replay.sum() / len(self.replay)),
            "own_passes": self.own_passes(self.total_steps),
        }


@dataclass
class _Pool:
    """The blocks of one kind, without end: a permutation for each epoch."""

    members: Ints
    tokens: Ints
    seed: int
    first_epoch: int

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (block, its supervised tokens)."""
        epoch = self.first_epoch
        while True:
            blocks = self.members[epoch_permutation(len(self.members), self.seed, epoch)]
            yield from zip(blocks.tolist(), self.tokens[blocks].tolist(), strict=True)
            epoch += 1


def _sequence(own: _Pool, replay: _Pool, shares: list[int], per_step: int) -> Iterator[int]:
    """Yield the blocks of all steps; the share of each step is in PARTS."""
    owns, replays = iter(own), iter(replay)
    own_next, replay_next = next(owns), next(replays)
    lacking = 0  # tokens of replay that the share asks for and that are not there yet, in PARTS
    for share in shares:
        for _ in range(per_step):
            after_own = lacking + share * own_next[1]
            after_replay = lacking - (PARTS - share) * replay_next[1]
            if abs(after_replay) < abs(after_own):
                yield replay_next[0]
                lacking, replay_next = after_replay, next(replays)
            else:
                yield own_next[0]
                lacking, own_next = after_own, next(owns)
