"""Lion."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from torchprime.training.optim.optimizer import Parameter, Slot, decayed


class Lion:
    """Lion: the sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675, algorithm 2).

    Its learning rate is three to ten times smaller than AdamW's, its weight decay as many times
    larger (section 5 of the paper).
    """

    def __init__(self, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0) -> None:
        self.betas, self.weight_decay = betas, weight_decay

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        return {"exp_avg": Slot(parameter.dims)}

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        beta1, beta2 = self.betas
        mean = state["exp_avg"]
        sign = (beta1 * mean + (1 - beta1) * gradient).sign()
        weight = decayed(weight, lr, parameter.decay(self.weight_decay))
        return {
            "weight": weight - lr * sign,
            "exp_avg": beta2 * mean + (1 - beta2) * gradient,
        }
