"""Loss spikes: decided on the device, from running statistics that are part of the checkpoint.

Mean and variance of the loss and of the gradient norm are plain ones over the first `window`
updates and exponential ones with that time constant after them. Once that many updates have
entered, a step whose loss or norm is above mean + deviations x standard deviation is a spike. With
`skip`, it changes neither weights nor the optimizer's state and does not enter the statistics; the
run's step, its learning rate and the order of the data continue. With `warn`, it is an update like
the others, so a lasting new level becomes the normal one.

Everything is one fp32 vector: the statistics, then a ring with a row for each of the last
`logging_steps` updates. The host reads it at logged steps only, and misses no spike in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

NAME = "spikes.state"  # in a checkpoint
# The statistics: of the loss and of the norm, [mean, mean, variance, variance], then the number of
# updates that entered, the spikes in a row until now, and all skipped updates.
SEEN, STREAK, SKIPPED, STATISTICS = range(4, 8)
ROW = 5  # step (0: no spike), loss, norm, and their limits


@dataclass(frozen=True)
class SpikeOptions:
    """Options of the decision.

    Attributes:
        ring: the number of updates between two reads by the host.
    """

    window: int
    deviations: float
    skip: bool
    ring: int

    @property
    def length(self) -> int:
        """The length of the state."""
        return STATISTICS + ROW * self.ring


class Spike(NamedTuple):
    """A spike, on the host."""

    step: int
    loss: float
    grad_norm: float
    loss_limit: float
    grad_norm_limit: float


class Judged(NamedTuple):
    """The decision about one update, on the device: bool scalar, and the state after it."""

    spike: Tensor
    state: Tensor


def first_state(options: SpikeOptions, stored: Tensor | None) -> Tensor:
    """Return the state on the host: zeros, or a checkpoint's, whose ring may have another size."""
    state = torch.zeros(options.length)
    if stored is None:
        return state
    state[:STATISTICS] = stored[:STATISTICS]
    ring = state[STATISTICS:].view(-1, ROW)
    for row in stored[STATISTICS:].view(-1, ROW).float():
        place = int(row[0]) % options.ring
        if row[0] > ring[place, 0]:
            ring[place] = row
    return state


def judge(state: Tensor, loss: Tensor, norm: Tensor, step: Tensor, options: SpikeOptions) -> Judged:
    """Decide about an update whose loss and norm are finite.

    Args:
        step: its number, from 1.
    """
    mean, variance, seen = state[:2], state[2:4], state[SEEN]
    values = torch.stack([loss, norm])
    limits = mean + options.deviations * variance.sqrt()
    spike = (seen >= options.window) & (values > limits).any()
    enters = ~spike if options.skip else torch.ones_like(spike)
    # The exact mean and variance of the first `window`, then exponential ones.
    share = 1 / (seen + 1).clamp(max=options.window)
    change = values - mean
    new_variance = (1 - share) * (variance + share * change * change)
    counts = torch.stack(
        [
            seen + enters,
            torch.where(spike, state[STREAK] + 1, 0.0),
            state[SKIPPED] + (spike if options.skip else torch.zeros_like(spike)),
        ]
    )
    statistics = torch.cat(
        [
            torch.where(enters, mean + share * change, mean),
            torch.where(enters, new_variance, variance),
            counts,
        ]
    )
    row = torch.where(spike, torch.cat([step[None], values, limits]), 0.0)
    places = torch.arange(options.ring, dtype=torch.float32, device=state.device)
    here = places == torch.remainder(step, options.ring)
    ring = torch.where(here[:, None], row[None], state[STATISTICS:].view(-1, ROW))
    return Judged(spike, torch.cat([statistics, ring.flatten()]))


def spikes_in(state: Sequence[float]) -> tuple[Spike, ...]:
    """Return the spikes in the ring of a state that was read, in the order of steps."""
    ring = state[STATISTICS:]
    rows = (ring[start : start + ROW] for start in range(0, len(ring), ROW))
    return tuple(sorted(Spike(int(row[0]), *row[1:]) for row in rows if row[0]))
