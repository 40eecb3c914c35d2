"""AdamW."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from torchprime.training.optim.optimizer import Parameter, Slot, decayed


class AdamW:
    """Adam with decoupled weight decay (Loshchilov & Hutter, arXiv:1711.05101, algorithm 2)."""

    def __init__(
        self,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        return {"exp_avg": Slot(parameter.dims), "exp_avg_sq": Slot(parameter.dims)}

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
        mean = beta1 * state["exp_avg"] + (1 - beta1) * gradient
        square = beta2 * state["exp_avg_sq"] + (1 - beta2) * gradient * gradient
        # 1 - beta^step, computed so that fp32 does not lose three digits at step 1.
        correction1, correction2 = (
            -torch.expm1(step * math.log(beta)) if beta else torch.ones_like(step)
            for beta in self.betas
        )
        denominator = (square / correction2).sqrt() + self.eps
        weight = decayed(weight, lr, parameter.decay(self.weight_decay))
        weight = weight - (lr / correction1) * (mean / denominator)
        return {"weight": weight, "exp_avg": mean, "exp_avg_sq": square}
