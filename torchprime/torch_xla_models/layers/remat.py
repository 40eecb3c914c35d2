"""Passes over the stack of layers: scan, rematerialization, backward barriers.

All three replace the container or wrap its members; the layers are unchanged. Scan and remat share
one mechanism, `LayerRunner` (layers/runner.py). The loops are in layers/scan.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch_xla.core.xla_model as xm
from torch import Tensor, nn

from torchprime.config.sections.remat import RematConfig
from torchprime.models.decoder import CausalLM, LayerContext
from torchprime.models.layer_kinds import repeating_groups
from torchprime.torch_xla_models.layers.runner import LayerRunner, behind_barrier
from torchprime.torch_xla_models.layers.scan import ScannedLayers


class _Remat(torch.autograd.Function):
    """One layer whose backward recomputes what is not kept."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx, runner: LayerRunner, barrier: bool, context: LayerContext, x: Tensor, *weights: Tensor
    ):
        ctx.runner, ctx.barrier, ctx.context = runner, barrier, context
        out, kept = runner.forward(x, weights, context)
        ctx.size = len(kept)
        ctx.save_for_backward(*kept, *weights)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        kept, weights = ctx.saved_tensors[: ctx.size], ctx.saved_tensors[ctx.size :]
        *behind, grad = behind_barrier([*kept, grad])
        grad_x, grad_weights = ctx.runner.backward(behind, weights, ctx.context, grad)
        if ctx.barrier:
            xm.optimization_barrier_([grad_x, *grad_weights])
        return None, None, None, grad_x, *ctx.runner.for_each(grad_weights)


class RematLayer(nn.Module):
    """A layer under remat; its parameters keep their names."""

    def __init__(self, layer: nn.Module, runner: LayerRunner, barrier: bool) -> None:
        super().__init__()
        self.runner, self.barrier = runner, barrier
        for name, child in layer.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        if not torch.is_grad_enabled():
            return self.runner.template(x, context)
        weights = [p for _, p in self.runner.template.named_parameters()]
        return _Remat.apply(self.runner, self.barrier, context, x, *weights)  # type: ignore


def apply_remat(
    model: CausalLM,
    remat: RematConfig,
    *,
    shard_gradient: Callable[[str, Tensor], Tensor],
    shard_output: Callable[[str, Tensor], Tensor],
) -> None:
    """Rewrite the model's stack in place; call after kernels and activation hooks are in.

    Args:
        shard_gradient: annotates the gradient of a layer's weight, by its name within the layer,
            with the weight's sharding, so that it is reduce-scattered where it is made.
        shard_output: annotates what is kept of a layer, by module name within the layer: left to
            itself, the partitioner would cut it like the weights and gather it over the batch.
    """
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)

    def runner(layer: nn.Module) -> LayerRunner:
        return LayerRunner(layer, remat, shard_gradient, shard_output)

    def single(layer: nn.Module) -> nn.Module:
        if remat.keeps_everything:
            return layer
        return RematLayer(layer, runner(layer), remat.optimization_barrier)

    if remat.scan_layers:
        groups = repeating_groups(model.architecture.layers)
        model.model.layers = ScannedLayers(list(layers), groups, runner, single)
        return
    input_has_gradient = model.model.embed_tokens.weight.requires_grad
    for index, layer in enumerate(layers):
        layers[index] = single(layer)
        if remat.keeps_everything and remat.optimization_barrier and input_has_gradient:
            layer.register_full_backward_hook(_barrier_after)
        input_has_gradient |= any(p.requires_grad for p in layer.parameters())


def _barrier_after(_: nn.Module, grad_input: Any, __: Any) -> None:
    xm.optimization_barrier_([g for g in grad_input if g is not None])
