"""Adafactor with a given learning rate."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchprime.training.optim.optimizer import Parameter, Slot, decayed


class Adafactor:
    """Adafactor (Shazeer & Stern 2018, arXiv:1804.04235) with a given learning rate, no momentum.

    Second moments of matrices are kept as row and column means (algorithm 4), the update is clipped
    to root mean square 1 (section 6), the decay is 1 - step^-0.8 (section 7.2). `eps` is the
    paper's epsilon_1, added to squared gradients.
    """

    def __init__(self, eps: float = 1e-30, weight_decay: float = 0.0, clip: float = 1.0) -> None:
        self.eps, self.weight_decay, self.clip = eps, weight_decay, clip

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        every = parameter.dims
        if len(parameter.own_dims) < 2:
            return {"exp_avg_sq": Slot(every)}
        return {
            "exp_avg_sq_row": Slot(every[:-1]),
            "exp_avg_sq_col": Slot((*every[:-2], every[-1])),
        }

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        beta, mean = 1 - torch.pow(step, -0.8), parameter.mean
        square = gradient * gradient + self.eps
        new: dict[str, Tensor] = {}
        if "exp_avg_sq_row" in state:
            # The parameter's dims, with the averaged one as size 1.
            row = beta * state["exp_avg_sq_row"][..., None] + (1 - beta) * mean(square, (-1,))
            column = beta * state["exp_avg_sq_col"][..., None, :] + (1 - beta) * mean(square, (-2,))
            new.update(exp_avg_sq_row=row.squeeze(-1), exp_avg_sq_col=column.squeeze(-2))
            scale = (row / mean(row, (-2,))).rsqrt() * column.rsqrt()
        else:
            new["exp_avg_sq"] = beta * state["exp_avg_sq"] + (1 - beta) * square
            scale = new["exp_avg_sq"].rsqrt()
        update = scale * gradient
        size = mean(update.pow(2), parameter.own_dims).sqrt()
        update = update / (size / self.clip).clamp(min=1.0)
        weight = decayed(weight, lr, parameter.decay(self.weight_decay))
        return {"weight": weight - lr * update, **new}
