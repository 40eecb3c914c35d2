"""Muon for the matrices of layers, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.optimizer import Parameter, Slot, decayed

# The quintic polynomial of Keller Jordan's Muon, as torch.optim.Muon has it.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
NORM_EPS = 1e-7

AdjustLr = Literal["original", "match_rms_adamw"]


class MuonSettings(NamedTuple):
    """Settings of Muon.

    Attributes:
        adjust_lr: `original` multiplies the learning rate by sqrt(max(1, rows / columns)),
            `match_rms_adamw` by 0.2 sqrt(max(rows, columns)), so that updates are as large as
            AdamW's.
        others_lr: the learning rate of everything but matrices, as a factor of the run's.
        steps: Newton-Schulz iterations.
    """

    adjust_lr: AdjustLr = "match_rms_adamw"
    others_lr: float = 1.0
    steps: int = 5


DEFAULTS = MuonSettings()


class Muon:
    """Momentum orthogonalized by Newton-Schulz iterations, as torch.optim.Muon has it.

    It updates the matrices of the decoder's layers. Embeddings, the output projection, norms and
    biases get AdamW's update. The iterations run in the weights' type: in bf16, as torch's do, for
    bf16 weights, and in fp32 for fp32 weights, so that the result does not depend on the mesh.

    Args:
        others: the optimizer of everything else.
    """

    def __init__(
        self,
        others: AdamW,
        settings: MuonSettings = DEFAULTS,
        *,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
    ) -> None:
        self.others, self.settings = others, settings
        self.momentum, self.nesterov, self.weight_decay = momentum, nesterov, weight_decay

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        if not is_hidden_matrix(parameter):
            return self.others.slots(parameter)
        return {"momentum_buffer": Slot(parameter.dims)}

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        if not is_hidden_matrix(parameter):
            factor = self.settings.others_lr
            rate = lr if factor == 1 else lr * factor
            return self.others.update(parameter, weight, gradient, state, rate, step)
        buffer = torch.lerp(state["momentum_buffer"], gradient, 1 - self.momentum)
        update = torch.lerp(gradient, buffer, self.momentum) if self.nesterov else buffer
        whole = parameter.whole(update.to(parameter.dtype))
        direction = parameter.own(orthogonalized(whole, self.settings.steps)).float()
        weight = decayed(weight, lr, parameter.decay(self.weight_decay))
        rate = lr * lr_factor(self.settings.adjust_lr, *parameter.shape[-2:])
        return {"weight": weight - rate * direction, "momentum_buffer": buffer}


def is_hidden_matrix(parameter: Parameter) -> bool:
    """Return True for a matrix of a decoder layer."""
    return len(parameter.own_dims) == 2 and parameter.names[0].startswith("model.layers.")


def lr_factor(adjust_lr: AdjustLr, rows: int, columns: int) -> float:
    """Return the factor of the learning rate for a matrix."""
    if adjust_lr == "original":
        return math.sqrt(max(1, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))


def orthogonalized(matrices: Tensor, steps: int) -> Tensor:
    """Return matrices with about the same singular vectors and singular values near 1.

    Args:
        matrices: [rows, columns], or a stack of them.
    """
    a, b, c = COEFFICIENTS
    stacked = matrices.dim() == 3
    wide = matrices.shape[-2] <= matrices.shape[-1]
    x = matrices if wide else matrices.transpose(-2, -1)
    x = x if stacked else x[None]
    norm = x.float().pow(2).sum((-2, -1), keepdim=True).sqrt().to(x.dtype)
    x = x / norm.clamp(min=NORM_EPS)
    for _ in range(steps):
        gram = torch.bmm(x, x.transpose(-2, -1))
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    x = x if stacked else x[0]
    return x if wide else x.transpose(-2, -1)
