"""A layer's gated unit for a TPU's compiler."""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.core.xla_model as xm
from torch import Tensor, nn

from torchprime.models.decoder import MLP


class _GradientsOnce(torch.autograd.Function):
    """Both tensors unchanged; their gradients are computed once, and stored."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return gate.view_as(gate), up.view_as(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        behind = [grad.clone() for grad in grads]
        xm.optimization_barrier_(behind)
        return tuple(behind)


class StoringMLP(MLP):
    """MLP whose gradients by `gate` and `up` are stored.

    Each of the two is a factor of two products. Left to itself, a TPU's compiler computes it again
    inside every product, and reads gate, up and the gradient of their product each time. Stored,
    both are written once, by the product that makes the last of these three.
    """

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return super().gated(*_GradientsOnce.apply(gate, up))  # type: ignore


def store_gradients(model: nn.Module) -> None:
    """Let every MLP store its gradients."""
    for module in model.modules():
        if type(module) is MLP:
            module.__class__ = StoringMLP
