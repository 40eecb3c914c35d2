"""Activation checkpointing by the same `remat` config: each layer keeps its input only.

The stack stays a list of layers here; `remat.scan_layers` shortens compile time under XLA and has
nothing to do in eager mode. Parameter names stay as they are.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def apply_remat(layers: nn.Module, policy: str) -> None:
    """`full`: a layer's activations are computed again in its backward; `none`: kept."""
    if policy != "full":
        return
    for layer in layers.children():
        plain: Any = layer.forward
        layer.forward = partial(checkpoint, plain, use_reentrant=False)  # type: ignore[method-assign]
