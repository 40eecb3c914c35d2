"""The protocol of optimizers: state slots per parameter and an update, in tensor operations.

An update reads nothing on the host and uses no Python number that changes from step to step:
learning rate and step count are tensors, so one compiled graph serves all steps. State is fp32
unless a slot says otherwise, and bf16 parameters get an fp32 master copy unless
`master_weights=false`: a bf16 weight of 1.0 can't take a step below 0.004.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Slot(NamedTuple):
    """A state tensor, initially zero.

    Attributes:
        dims: of its parameter that it keeps.
        per: the number of elements along the last of them that share one value.
    """

    dims: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    per: int = 1

    def kept(self, sizes: Sequence[int]) -> tuple[int, ...]:
        """Return the slot's sizes, or offsets, from those of its parameter."""
        found = [sizes[dim] for dim in self.dims]
        if self.per > 1:
            found[-1] //= self.per
        return tuple(found)


Mean = Callable[[Tensor, tuple[int, ...]], Tensor]
Convert = Callable[[Tensor], Tensor]


def mean_over(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return the mean over some dims, which stay with size 1."""
    return values.mean(dim=dims, keepdim=True)


def unchanged(values: Tensor) -> Tensor:
    """Return the values: this process holds all of them."""
    return values


class Parameter(NamedTuple):
    """Facts about one parameter that an optimizer may use.

    Attributes:
        names: in a checkpoint; a stack of layers has one for each layer.
        shape: of the whole parameter.
        stacked: dim 0 counts layers, so statistics are per layer.
        weight_decay: the rate of its parameter group, for each layer of a stack if they differ;
            None takes the optimizer's own.
        mean: returns the mean over dims of the whole parameter, for values sharded like it; if this
            process holds only a shard, it communicates with the others.
        whole: returns values of the whole parameter from those of this process's shard, with
            communication like `mean`.
        own: returns this process's shard of values of the whole parameter.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    stacked: bool = False
    weight_decay: float | Tensor | None = None
    mean: Mean = mean_over
    whole: Convert = unchanged
    own: Convert = unchanged

    @property
    def dims(self) -> tuple[int, ...]:
        """Every dim."""
        return tuple(range(len(self.shape)))

    @property
    def own_dims(self) -> tuple[int, ...]:
        """The dims of one layer's parameter."""
        return self.dims[int(self.stacked) :]

    def decay(self, default: float) -> float | Tensor:
        """Return the rate of weight decay. Without a rate of its own, a parameter has the default
        if it is a matrix or an embedding, and 0 if it is a norm or a bias."""
        if self.weight_decay is not None:
            return self.weight_decay
        return default if decays(self.names[0]) else 0.0


class Optimizer(Protocol):
    """An optimizer: state slots by name, and an in-place update of one parameter."""

    weight_decay: float

    def slots(self, parameter: Parameter) -> dict[str, Slot]: ...

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        """Return the new values: the fp32 weight under "weight", and each slot under its name."""
        ...


def decayed(weight: Tensor, lr: Tensor, rate: float | Tensor) -> Tensor:
    """Return the weight after decoupled weight decay."""
    if isinstance(rate, float) and not rate:
        return weight
    return weight * (1 - lr * rate)


def decays(name: str) -> bool:
    """Return True for matrices and embeddings, which get weight decay, not norms and biases, as in
    HF's Trainer."""
    return not (name.endswith("bias") or "norm" in name)
