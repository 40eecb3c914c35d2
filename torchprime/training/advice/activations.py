"""Bytes that the backward pass keeps, counted on a model without storage.

The forward pass of one and of two layers runs on tensors without data, and every tensor that
autograd saves is counted once by its storage. The difference is one layer's share. So the count
knows the architecture, the adapter and remat, without a formula for any of them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from torchprime.models.decoder import CausalLM, replace_attention_cores

# Builds the model with this number of layers, without storage.
BuildLayers = Callable[[int], CausalLM]
# A kernel keeps queries, keys, values, output and a number per query; the reference core keeps the
# scores too.
Core = Literal["kernel", "reference"]


class Kept(NamedTuple):
    """Bytes kept for the backward pass of one forward pass."""

    outside: int  # embedding, rotary tables, masks, final norm
    layer: int  # of each layer

    def of(self, layers: int) -> int:
        """Return the bytes of a model with so many layers."""
        return self.outside + layers * self.layer


def kept_bytes(build: BuildLayers, rows: int, block_size: int, *, core: Core, remat: bool) -> Kept:
    """Count what one forward pass of [rows, block_size] keeps.

    Args:
        remat: only a layer's input is kept.
    """
    one, two = (_count(build(n), rows, block_size, core, remat) for n in (1, 2))
    return Kept(outside=2 * one - two, layer=two - one)


def _count(model: CausalLM, rows: int, block_size: int, core: Core, remat: bool) -> int:
    if core == "kernel":
        replace_attention_cores(model, lambda head_dim, window: _KernelFootprint())
    model.to("meta")
    layers: Any = model.model.layers
    if remat:
        for layer in layers:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    own = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers())}
    found: dict[int, tuple[Any, int]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            # The storage is held, so that no later one gets its address.
            found[storage._cdata] = storage, storage.nbytes()
        return tensor

    field = torch.zeros(rows, block_size, dtype=torch.int32, device="meta")
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        model(field, field, field)
    return sum(size for _, size in found.values())


class _KernelFootprint(nn.Module):
    """A core that keeps what flash attention keeps (Dao et al. 2022, arXiv:2205.14135)."""

    window = None

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """Return the segments; a kernel's block masks are small beside activations."""
        return segment_ids

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """Return [B, H, S, h], without values."""
        return _Footprint.apply(q, k, v)  # pyright: ignore[reportReturnType]


class _Footprint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, out, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return out
