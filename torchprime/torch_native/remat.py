"""Activation checkpointing by the same `remat` config: each layer keeps its input only.

The stack stays a list of layers here; `remat.scan_layers` shortens compile time under XLA and has
nothing to do in eager mode. Parameter names stay as they are.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from torchprime.models.decoder import DecoderLayer, LayerContext


class CheckpointedLayer(DecoderLayer):
    """A layer that keeps nothing for its backward but its input.

    A class, so that torch.compile makes one graph for all layers: it would pass over a layer whose
    `forward` is a `functools.partial`, and compile each anew whose `forward` is a closure.
    """

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        again = checkpoint(super().forward, x_BSD, context, use_reentrant=False)
        return cast(Tensor, again)


def apply_remat(layers: nn.Module, policy: str) -> None:
    """`full` or `offload`: a layer's activations are computed again in its backward, the input
    stays on the device; `none`: kept."""
    if policy == "none":
        return
    for layer in layers.children():
        layer.__class__ = CheckpointedLayer
