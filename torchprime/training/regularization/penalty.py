"""The penalty on the distance of the weights from the base's: EWC and L2-SP.

    strength * sum of F (w - w0)^2

EWC (Kirkpatrick et al. 2017, arXiv:1612.00796, equation 3) takes the diagonal Fisher information of
the base as F; L2-SP (Li et al. 2018, arXiv:1802.01483) takes 1. `strength` is half of their lambda
and alpha. Everything is elementwise on a device's shard; only the value is summed over shards.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

PENALTIES = EWC, L2_SP = "ewc", "l2_sp"  # names of terms in a step's record


@dataclass(frozen=True)
class Penalty:
    """A penalty by its name, and its strength."""

    name: str
    strength: float

    @property
    def has_fisher(self) -> bool:
        """Return True if F is not 1."""
        return self.name == EWC


class Anchor(NamedTuple):
    """The frozen tensors of one weight, sharded like it."""

    base: Tensor  # w0, in the type of the weight
    fisher: Tensor | None  # F in fp32; None is 1


@dataclass(frozen=True)
class AnchorSource:
    """The values of anchors on the host, by the parameters' names in the model.

    Attributes:
        fisher: None if it is 1 everywhere.
    """

    base: Callable[[str], Tensor]
    fisher: Callable[[str], Tensor] | None = None


def weighted_squares(weight: Tensor, anchor: Anchor) -> Tensor:
    """Return the sum of F (w - w0)^2 over a shard; the weight is fp32."""
    squares = (weight - anchor.base.float()).pow(2)
    return (squares if anchor.fisher is None else anchor.fisher * squares).sum()


def penalty_gradient(weight: Tensor, anchor: Anchor, strength: float) -> Tensor:
    """Return the gradient of the penalty in a shard of an fp32 weight."""
    distance = weight - anchor.base.float()
    return 2 * strength * (distance if anchor.fisher is None else anchor.fisher * distance)
