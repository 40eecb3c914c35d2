"""Selection of the training examples in a mixture of weighted sources.

Weights are shares of the result, in rows or in tokens. No example is used twice: the scarcest
source limits the size of the result, and unused examples are reported. The selection is a pure
function of the seed, so every process selects the same examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from torchprime.data.blocks.order import epoch_permutation
from torchprime.errors import DataError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Share:
    """One source's part of the mixture: its weight in its group (None uses every example)."""

    name: str
    weight: float | None = None
    replay: bool = False


def shares_of(parts: Sequence[Share], replay_share: float | None) -> dict[str, float] | None:
    """Return name -> share of the whole, summing to 1; None if all examples are to be used.

    General data marked `replay` gets `replay_share`, split by its weights; the other sources share
    the rest by their weights.
    """
    main, replay = _groups(parts)
    if (replay_share is None) != (not replay):
        raise DataError(
            f"dataset.replay_share={replay_share}: {len(replay)} parts of dataset.mixture have "
            "replay=true, expected both or neither. Set dataset.replay_share=0.1 and mark the "
            "general data with replay: true"
        )
    if not main:
        raise DataError(
            "dataset.mixture has only parts with replay=true, expected at least one without"
        )
    given = [part for part in parts if part.weight is not None]
    if not given and not replay:
        return None
    replayed = replay_share or 0.0
    shares = [(1 - replayed, shares_apart(main)), (replayed, shares_apart(replay))]
    return {name: total * share for total, group in shares for name, share in group.items()}


def _groups(parts: Sequence[Share]) -> tuple[list[Share], list[Share]]:
    """Return the user's own parts, and those of replay."""
    return [p for p in parts if not p.replay], [p for p in parts if p.replay]


def shares_apart(group: Sequence[Share]) -> dict[str, float]:
    """Return name -> share among the parts of one kind, own or replay, summing to 1."""
    weighted = sum(part.weight is not None for part in group)
    own = bool(group) and not group[0].replay
    if weighted not in (0, len(group)) or (own and len(group) > 1 and not weighted):
        names = ", ".join(part.name for part in group if part.weight is None)
        raise DataError(
            f"dataset.mixture: no weight is given for {names}, expected one for every part "
            "or for none. Add weight: to each"
        )
    weights = [1.0 if part.weight is None else part.weight for part in group]
    return {part.name: w / sum(weights) for part, w in zip(group, weights, strict=True)}


def groups_to_pack(
    parts: Sequence[Share], replay_share: float | None, replay_apart: bool
) -> list[dict[str, float] | None]:
    """Return the shares within each group of sources whose examples share blocks: all sources, or
    own sources and replay apart. None uses every example."""
    if replay_apart:
        return [shares_apart(group) for group in _groups(parts)]
    return [shares_of(parts, replay_share)]


def choose(
    sizes: Ints,
    sources: npt.NDArray[np.int32],
    names: Sequence[str],
    shares: Mapping[str, float],
    seed: int,
) -> Ints:
    """Return the indices of the examples to use, ascending.

    Args:
        sizes: the size of each example: 1, or its number of tokens.
        sources: the index of each example's source in `names`.
        shares: name -> share of the whole.
    """
    members = {name: np.flatnonzero(sources == place) for place, name in enumerate(names)}
    for name, share in shares.items():
        if share > 0 and not len(members.get(name, ())):
            raise DataError(f"dataset.mixture: the part {name} has no usable example")
    total = min(sizes[members[name]].sum() / share for name, share in shares.items() if share > 0)
    chosen: list[Ints] = []
    for number, (name, share) in enumerate(shares.items()):
        if share == 0:
            continue
        mine = members[name]
        shuffled = mine[epoch_permutation(len(mine), seed, number)]
        # The number of examples that comes closest to the share without exceeding it, at least one.
        within = int((np.cumsum(sizes[shuffled]) <= total * share * (1 + 1e-9)).sum())
        chosen.append(shuffled[: max(1, within)])
    return np.sort(np.concatenate(chosen))
