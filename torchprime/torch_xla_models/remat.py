"""Passes over the stack of layers: scan, rematerialization, backward barriers.

All three replace the container or wrap its members; the layers do not know. The one mechanism under
scan and remat is a function that runs a layer, keeps some of what its backward will want, and in
the backward traces the layer again, fetching what was kept and recomputing the rest. Since XLA
tensors are lazy, whatever is fetched makes the code that would recompute it dead, so keeping
everything costs no second forward and keeping nothing is full remat.

Scan holds each parameter of all layers in one stacked tensor [layers, ...] and loops over it on the
device, so that compile time does not grow with depth and no per-step stacking is paid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch_xla.core.xla_model as xm
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch_xla.distributed.spmd.xla_sharding import apply_backward_optimization_barrier
from torch_xla.experimental.scan import _scan_impl_flat

from torchprime.errors import ConfigError
from torchprime.models.decoder import CausalLM, LayerContext

STACKED = "stacked"


def device_loop(
    body: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]],
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    *,
    reverse: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Loop on the device over dim 0 of `xs`: (carry, x_i) -> (carry, y_i); y is stacked.

    Device tensors that the body reads without being given them (weights, say) become loop inputs.
    """
    return _scan_impl_flat(body, list(carry), list(xs), reverse=reverse)


class _Kept:
    """Which tensors of a layer's backward are kept, by the order in which autograd saves them."""

    def __init__(self, keep: Callable[[Tensor], bool]) -> None:
        self.keep = keep
        self.indices: list[int] = []

    def record(self) -> tuple[list[Tensor], saved_tensors_hooks]:
        """Hooks for the forward: collect what is to be kept."""
        tensors: list[Tensor] = []
        self.indices = []
        count = 0

        def pack(tensor: Tensor) -> None:
            nonlocal count
            if self.keep(tensor):
                self.indices.append(count)
                tensors.append(tensor.detach())
            count += 1

        return tensors, saved_tensors_hooks(pack, _never)

    def replay(self, kept: Sequence[Tensor]) -> saved_tensors_hooks:
        """Hooks for the backward's trace: put back what was kept."""
        by_index = dict(zip(self.indices, kept, strict=True))
        count = -1

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += 1
            return by_index.get(count, tensor)

        return saved_tensors_hooks(pack, lambda tensor: tensor)


def _never(_: Any) -> Tensor:
    raise AssertionError("a forward under a loop has no backward of its own")


class LayerRunner:
    """Runs one layer as a function of (hidden, weights, context), forward and backward."""

    def __init__(
        self, template: nn.Module, policy: str, constrain: Callable[[str, Tensor], Tensor]
    ) -> None:
        self.template = template
        self.constrain = constrain
        self.names = [name for name, _ in template.named_parameters()]
        self.policy = policy
        self.kept: _Kept | None = None

    def call(self, x: Tensor, weights: Sequence[Tensor], context: LayerContext) -> Tensor:
        named = dict(zip(self.names, weights, strict=True))
        return torch.func.functional_call(self.template, named, (x, context))

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], context: LayerContext
    ) -> tuple[Tensor, list[Tensor]]:
        """The layer's output and the tensors kept for its backward besides its input."""
        if self.policy == "full" or not torch.is_grad_enabled():
            with torch.no_grad():
                return self.call(x, weights, context), []
        self.kept = _Kept(_activations_only(x, context))
        tensors, hooks = self.kept.record()
        x = x.detach().requires_grad_()
        weights = [w.detach().requires_grad_() for w in weights]
        with hooks:
            out = self.call(x, weights, context)
        return out.detach(), tensors

    def backward(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        context: LayerContext,
        kept: Sequence[Tensor],
        grad: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Gradients of the layer's input and weights."""
        x = x.detach().requires_grad_()
        weights = [w.detach().requires_grad_() for w in weights]
        with torch.enable_grad():
            if self.kept is not None and kept:
                with self.kept.replay(kept):
                    out = self.call(x, weights, context)
            else:
                out = self.call(x, weights, context)
            grad_x, *grad_weights = torch.autograd.grad(out, [x, *weights], grad)
        pairs = zip(self.names, grad_weights, strict=True)
        return grad_x, [self.constrain(name, g) for name, g in pairs]


def _activations_only(x: Tensor, context: LayerContext) -> Callable[[Tensor], bool]:
    """Keep what depends on the batch; weights and context are at hand in the backward."""
    batch, length = x.shape[:2]
    at_hand = {tuple(t.shape) for t in (context.cos, context.sin, *context.attention)}

    def keep(tensor: Tensor) -> bool:
        shape = tuple(tensor.shape)
        return tensor.dim() >= 2 and shape[0] == batch and length in shape and shape not in at_hand

    return keep


class _Remat(torch.autograd.Function):
    """One layer whose activations are recomputed in the backward."""

    @staticmethod
    def forward(ctx, runner: LayerRunner, context: LayerContext, x: Tensor, *weights: Tensor):  # type: ignore[override]
        ctx.runner, ctx.context = runner, context
        ctx.save_for_backward(x, *weights)
        return runner.forward(x, weights, context)[0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, *weights = ctx.saved_tensors
        # Behind the barrier the compiler can't see that this forward was computed before, and so
        # does not keep the first one's activations alive to reuse them.
        behind = [t.clone() for t in (x, grad)]
        xm.optimization_barrier_(behind)
        grad_x, grad_weights = ctx.runner.backward(behind[0], weights, ctx.context, [], behind[1])
        return None, None, grad_x, *grad_weights


class RematLayer(nn.Module):
    """A layer under full remat; its parameters keep their names."""

    def __init__(self, layer: nn.Module, constrain: Callable[[str, Tensor], Tensor]) -> None:
        super().__init__()
        self.runner = LayerRunner(layer, "full", constrain)
        for name, child in layer.named_children():
            self.add_module(name, child)

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        if not torch.is_grad_enabled():
            return self.runner.template(x, context)
        weights = [p for _, p in self.runner.template.named_parameters()]
        return _Remat.apply(self.runner, context, x, *weights)  # type: ignore[no-any-return]


class _Scan(torch.autograd.Function):
    """All layers as one loop forward and one loop backward."""

    @staticmethod
    def forward(ctx, runner: LayerRunner, context: LayerContext, x: Tensor, *stacked: Tensor):  # type: ignore[override]
        ctx.runner = runner
        flat = _flatten(context)
        training = any(ctx.needs_input_grad)

        def body(carry: Sequence[Tensor], weights: Sequence[Tensor]):
            h, *rest = carry
            if not training:
                return [runner.call(h, weights, _unflatten(rest)), *rest], []
            with torch.enable_grad():
                out, kept = runner.forward(h, weights, _unflatten(rest))
            return [out, *rest], [h, *kept]

        carry, saved = device_loop(body, [x, *flat], stacked)
        ctx.save_for_backward(*flat, *saved, *stacked)
        ctx.sizes = len(flat), len(saved)
        return carry[0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        runner = ctx.runner
        context_size, saved_size = ctx.sizes
        tensors = list(ctx.saved_tensors)
        flat = tensors[:context_size]
        saved = tensors[context_size : context_size + saved_size]
        stacked = tensors[context_size + saved_size :]

        def body(carry: Sequence[Tensor], xs: Sequence[Tensor]):
            g, *rest = carry
            h, kept, weights = xs[0], xs[1:saved_size], xs[saved_size:]
            grad_x, grad_weights = runner.backward(h, weights, _unflatten(rest), kept, g)
            return [grad_x, *rest], grad_weights

        carry, grads = device_loop(body, [grad, *flat], [*saved, *stacked], reverse=True)
        return None, None, carry[0], *grads


def _flatten(context: LayerContext) -> list[Tensor]:
    return [context.cos, context.sin, *context.attention]


def _unflatten(tensors: Sequence[Tensor]) -> LayerContext:
    return LayerContext(tensors[0], tensors[1], tuple(tensors[2:]))


class ScannedLayers(nn.Module):
    """The stack as one loop. `stacked` has a layer's parameter names, each tensor [layers, ...]."""

    def __init__(
        self,
        layers: Sequence[nn.Module],
        policy: str,
        constrain: Callable[[str, Tensor], Tensor],
    ) -> None:
        super().__init__()
        template = layers[0]
        self.depth = len(layers)
        self.stacked = copy.deepcopy(template)
        for module in self.stacked.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                shape = (self.depth, *parameter.shape)
                setattr(module, name, nn.Parameter(parameter.new_empty(shape)))
        # The runner is no module: its template is code, not weights.
        self.runner = LayerRunner(template, policy, constrain)

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        weights = [p for _, p in self.stacked.named_parameters()]
        return _Scan.apply(self.runner, context, x, *weights)  # type: ignore[no-any-return]


def apply_remat(
    model: CausalLM,
    *,
    scan_layers: bool,
    policy: str,
    optimization_barrier: bool,
    constrain: Callable[[str, Tensor], Tensor],
) -> None:
    """Rewrite the model's stack in place; call after kernels and activation hooks are in.

    Args:
        scan_layers: one loop over stacked parameters instead of unrolled layers.
        policy: `none` keeps activations, `full` keeps only each layer's input.
        optimization_barrier: unrolled only; keeps the backward of a layer in one piece, so that
            gradients of all layers are not held to be reduced together.
        constrain: annotates the gradient of a layer's weight, by its name within the layer, with
        the
            weight's sharding, so that it is reduce-scattered where it is made.

    Raises:
        ConfigError: scan over layers that are not all of one kind.
    """
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    if scan_layers:
        if len(model.model.windows) > 1:
            raise ConfigError(
                "remat.scan_layers=true needs layers that are all alike, but this model mixes full "
                "and sliding-window attention; set remat.scan_layers=false."
            )
        model.model.layers = ScannedLayers(list(layers), policy, constrain)
        return
    for index, layer in enumerate(layers):
        if optimization_barrier:
            apply_backward_optimization_barrier(layer)
        if policy == "full":
            layers[index] = RematLayer(layer, constrain)
