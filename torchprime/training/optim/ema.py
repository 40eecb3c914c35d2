"""The exponential moving average of the trained weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchprime.training.optim.optimizer import Optimizer, Parameter, Slot

EMA = "ema"  # the slot: its name in a checkpoint is optimizer.ema.WEIGHT


class WithEma:
    """An optimizer that also averages its weights: ema = decay x ema + (1 - decay) x weight.

    The average is fp32 and begins as the weights after the first update, as torch's AveragedModel
    does. It is a slot of the optimizer's state, so it is sharded, stored and resumed like others.
    """

    def __init__(self, inner: Optimizer, decay: float) -> None:
        self.inner, self.decay, self.weight_decay = inner, decay, inner.weight_decay

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        return {**self.inner.slots(parameter), EMA: Slot(parameter.dims)}

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        new = self.inner.update(parameter, weight, gradient, state, lr, step)
        moved = torch.lerp(state[EMA], new["weight"].float(), 1 - self.decay)
        return {**new, EMA: torch.where(step == 1, new["weight"].float(), moved)}
