"""Activation checkpointing by the same `remat` config: each layer stores its input only.

The stack stays a list of layers here; `remat.scan_layers` shortens compile time under XLA and has
no effect in eager mode. Parameter names are unchanged.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchprime.models.decoder import DecoderLayer, LayerContext


class CheckpointedLayer(DecoderLayer):
    """A layer that stores only its input for the backward pass.

    It is a class, so that torch.compile makes one graph for all layers: it would skip a layer whose
    `forward` is a `functools.partial`, and recompile each one whose `forward` is a closure.
    """

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        again = checkpoint(super().forward, x_BSD, context, use_reentrant=False)
        return cast(Tensor, again)


def apply_remat(layers: nn.Module, policy: str) -> None:
    """Apply a policy. `full` or `offload`: a layer's activations are recomputed in its backward
    pass, the input stays on the device; `none`: they are stored."""
    if policy == "none":
        return
    for layer in layers.children():
        layer.__class__ = CheckpointedLayer
