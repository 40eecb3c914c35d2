"""Activation checkpointing by the same `remat` config as on TPUs.

The stack stays a list of layers here; `remat.scan_layers` shortens compile time under XLA and has
no effect in eager mode. Parameter names are unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from torchprime.config.checks import refuse
from torchprime.config.sections.remat import LAYER_INPUT, RematConfig
from torchprime.models.checkpointing import checkpoint_layers
from torchprime.models.decoder import LayerContext, LayerStack


class Away(NamedTuple):
    """A layer's input in host memory, and the device that it came from."""

    values: Tensor
    device: torch.device


def to_host(tensor: Tensor) -> Away:
    """Start copying to pinned host memory. The copy is queued behind the device's earlier work, and
    the host does not wait for it."""
    values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return Away(values.copy_(tensor, non_blocking=True), tensor.device)


def to_device(away: Away) -> Tensor:
    """Start copying back, queued in the same way."""
    return away.values.to(away.device, non_blocking=True)


class OffloadingStack(LayerStack):
    """A stack whose layers' inputs wait for the backward pass in host memory.

    The hooks are outside of the layers, since torch.compile does not trace them.
    """

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        for layer in self:
            with saved_tensors_hooks(_pack(x_BSD), _unpack):
                x_BSD = layer(x_BSD, context)
        return x_BSD


def _pack(x: Tensor) -> Callable[[Tensor], Any]:
    place, shape = x.data_ptr(), x.shape

    def pack(saved: Tensor) -> Any:
        same = saved.data_ptr() == place and saved.shape == shape
        return to_host(saved) if same else saved

    return pack


def _unpack(packed: Any) -> Tensor:
    return to_device(packed) if isinstance(packed, Away) else packed


def check_remat(remat: RematConfig, device_type: str) -> None:
    """Check that this backend can keep in host memory what the config wants there.

    Raises:
        ConfigError: it cannot: on GPUs it moves the inputs of layers only.
    """
    inside = [name for name in remat.offloaded if name != LAYER_INPUT]
    if inside and device_type == "cuda":
        refuse(
            "remat.offload",
            inside,
            f"[{LAYER_INPUT}], the one name that the GPU backend moves to host memory",
            "Use remat.save to keep the others on the GPU, or remat.recompute.",
        )


def apply_remat(layers: nn.Module, remat: RematConfig, device_type: str) -> None:
    """Apply a config to sharded layers, before they are compiled. A CPU's tensors are in host
    memory already, so nothing moves there."""
    if not remat.selects:
        return
    checkpoint_layers(list(layers.children()), remat.kept_outputs)
    if device_type == "cuda" and LAYER_INPUT in remat.offloaded:
        layers.__class__ = OffloadingStack
