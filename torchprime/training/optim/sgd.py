"""Stochastic gradient descent with momentum."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torchprime.training.optim.optimizer import Parameter, Slot


class Sgd:
    """Gradient descent with momentum, as torch.optim.SGD has it without dampening.

    Weight decay is added to the gradient: with momentum it is not decoupled.
    """

    def __init__(
        self, momentum: float = 0.9, nesterov: bool = False, weight_decay: float = 0.0
    ) -> None:
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        return {"momentum_buffer": Slot(parameter.dims)} if self.momentum else {}

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        decay = parameter.decay(self.weight_decay)
        if not isinstance(decay, float) or decay:
            gradient = gradient + decay * weight
        if not self.momentum:
            return {"weight": weight - lr * gradient}
        buffer = self.momentum * state["momentum_buffer"] + gradient
        update = gradient + self.momentum * buffer if self.nesterov else buffer
        return {"weight": weight - lr * update, "momentum_buffer": buffer}
