"""Passes over the stack of layers: scan, rematerialization, backward barriers.

All three replace the container or wrap its members; the layers are unchanged. Scan and remat share
one mechanism: a function that runs a layer, stores the tensors that the config names, and in the
backward traces the layer again, fetching stored values and recomputing the rest. Since XLA tensors
are lazy, a fetched value makes the code that would recompute it dead: storing the outputs of the
matrix products saves all but the attention scores, storing nothing is full remat.

Scan holds each parameter of all layers in one stacked tensor [layers, ...] and loops over it on the
device, so that compile time does not grow with depth and no per-step stacking is paid.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla.experimental.scan import _scan_impl_flat
from torch_xla.experimental.stablehlo_custom_call import place_to_device, place_to_host

from torchprime.adapters.dropout import CounterDropout, set_position
from torchprime.config.sections.remat import LAYER_INPUT, NAMES, RematConfig
from torchprime.counter_bits import Position
from torchprime.errors import ConfigError
from torchprime.models.decoder import NAMED_OUTPUTS, CausalLM, LayerContext
from torchprime.torch_xla_models.linear import XlaLinear

STACKED = "stacked"


def device_loop(
    body: Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]],
    carry: Sequence[Tensor],
    xs: Sequence[Tensor],
    *,
    reverse: bool = False,
) -> tuple[list[Tensor], list[Tensor]]:
    """Loop on the device over dim 0 of `xs`: (carry, x_i) -> (carry, y_i); y is stacked.

    Device tensors that the body reads and that are no arguments (weights, say) become loop inputs.
    """
    return _scan_impl_flat(body, list(carry), list(xs), reverse=reverse)


def modules_of(name: str, layer: nn.Module) -> list[str]:
    """Return the modules of a layer whose outputs are kept for a name. An attention kernel has one
    for each result that its backward needs."""
    module = NAMED_OUTPUTS[name]
    parts = [f"{module}.{part}" for part, _ in layer.get_submodule(module).named_children()]
    return parts if name == "core_out" and parts else [module]


class _Fetched(torch.autograd.Function):
    """Autograd function that returns the value stored by the forward instead of a computed tensor.
    Gradients go to the computed one, whose own computation is then dead unless its backward reads
    it."""

    @staticmethod
    def forward(ctx, computed: Tensor, kept: Tensor) -> Tensor:  # type: ignore[override]
        return kept.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return grad, None


class LayerRunner:
    """Runner of one layer as a function of (hidden, weights, context), forward and backward.

    Args:
        template: the layer whose code is run, with weights given in the call.
        remat: the tensors that are kept for the backward, and those of them in the host's memory.
        shard_gradient: annotates the gradient of a weight, by its name in the layer.
        shard_output: annotates a module's output, by its name in the layer ("" for the layer's
            own).
    """

    def __init__(
        self,
        template: nn.Module,
        remat: RematConfig,
        shard_gradient: Callable[[str, Tensor], Tensor],
        shard_output: Callable[[str, Tensor], Tensor],
    ) -> None:
        self.template = template
        self.shard_gradient, self.shard_output = shard_gradient, shard_output
        named = dict(template.named_parameters())
        self.names = list(named)
        self.trained = [parameter.requires_grad for parameter in named.values()]
        # A CPU's virtual devices are in host memory already, and do not know the annotation.
        away = remat.offloaded if xr.device_type() == "TPU" else ()
        names = [name for name in NAMES[1:] if name not in remat.recomputed]
        kept = [(module, name) for name in names for module in modules_of(name, template)]
        self.kept_names = [module for module, _ in kept]
        # The module by which an output is annotated: the core's for each of its results.
        self.owners = {module: NAMED_OUTPUTS[name] for module, name in kept}
        self.offloaded = [name in away for name in (LAYER_INPUT, *(name for _, name in kept))]

    def call(self, x: Tensor, weights: Sequence[Tensor], context: LayerContext) -> Tensor:
        """Return the layer's output, called normally."""
        named = dict(zip(self.names, weights, strict=True))
        return torch.func.functional_call(self.template, named, (x, context))

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], context: LayerContext
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the layer's output, and its input and the outputs kept for `backward`."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str, out: Tensor) -> Tensor:
            outputs[name] = self.shard_output(self.owners[name], out)
            return outputs[name]

        with torch.no_grad(), self._on_outputs(keep):
            out = self.call(x, weights, context)
        return out, [self.shard_output("", x), *(outputs[name] for name in self.kept_names)]

    def backward(
        self,
        kept: Sequence[Tensor],
        weights: Sequence[Tensor],
        context: LayerContext,
        grad: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the layer's input and trained weights, from the values that
        `forward` stored."""
        x = self.shard_output("", kept[0]).detach().requires_grad_()
        leaves = [w.detach().requires_grad_(t) for w, t in zip(weights, self.trained, strict=True)]
        values = dict(zip(self.kept_names, kept[1:], strict=True))

        def fetch(name: str, out: Tensor) -> Any:
            return _Fetched.apply(out, self.shard_output(self.owners[name], values[name]))

        with torch.enable_grad(), self._on_outputs(fetch):
            out = self.call(x, leaves, context)
            trained = list(compress(leaves, self.trained))
            grad_x, *grad_weights = torch.autograd.grad(out, [x, *trained], grad)
        pairs = zip(compress(self.names, self.trained), grad_weights, strict=True)
        return grad_x, [self.shard_gradient(name, g) for name, g in pairs]

    def put_away(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Return what `forward` kept, with some of it moved to the host's memory."""
        pairs = zip(kept, self.offloaded, strict=True)
        return [place_to_host(tensor) if away else tensor for tensor, away in pairs]

    def fetch_back(self, kept: Sequence[Tensor]) -> list[Tensor]:
        """Return what `put_away` returned, on the device."""
        pairs = zip(kept, self.offloaded, strict=True)
        return [place_to_device(tensor) if away else tensor for tensor, away in pairs]

    def for_each(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Return a gradient for each weight, None for a frozen one, from those of `backward`."""
        found = iter(gradients)
        return [next(found) if trained else None for trained in self.trained]

    @contextmanager
    def _on_outputs(self, replace: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Replace the output of each stored module by the result of `replace`, inside the
        context."""

        def hook(name: str) -> Callable[..., Tensor]:
            return lambda _, __, out: replace(name, out)

        handles = [
            self.template.get_submodule(name).register_forward_hook(hook(name))
            for name in self.kept_names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


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
        # Behind the barrier the compiler can't recognize that this forward was computed before, and
        # so does not keep the first one's activations alive to reuse them.
        *behind, grad = (t.clone() for t in (*kept, grad))
        xm.optimization_barrier_([*behind, grad])
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


class _Scan(torch.autograd.Function):
    """All layers as one loop forward and one loop backward."""

    @staticmethod
    def forward(ctx, runner: LayerRunner, context: LayerContext, x: Tensor, *stacked: Tensor):  # type: ignore[override]
        ctx.runner = runner
        position = _position(runner.template)
        flat = [*(position or ()), *_flatten(context)]
        ctx.has_position = position is not None

        def body(carry: Sequence[Tensor], weights: Sequence[Tensor]):
            h, *rest = carry
            with _positioned(runner.template, rest, ctx.has_position) as context:
                out, kept = runner.forward(h, weights, context)
            return [out, *rest], runner.put_away(kept)

        carry, kept = device_loop(body, [x, *flat], stacked)
        ctx.save_for_backward(*flat, *kept, *stacked)
        ctx.sizes = len(flat), len(kept)
        return carry[0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        runner = ctx.runner
        context_size, kept_size = ctx.sizes
        tensors = list(ctx.saved_tensors)
        flat, layers = tensors[:context_size], tensors[context_size:]

        def body(carry: Sequence[Tensor], xs: Sequence[Tensor]):
            g, *rest = carry
            kept, weights = runner.fetch_back(xs[:kept_size]), xs[kept_size:]
            with _positioned(runner.template, rest, ctx.has_position) as context:
                grad_x, grad_weights = runner.backward(kept, weights, context, g)
            return [grad_x, *rest], grad_weights

        carry, grads = device_loop(body, [grad, *flat], layers, reverse=True)
        return None, None, carry[0], *runner.for_each(grads)


def _flatten(context: LayerContext) -> list[Tensor]:
    return [context.cos, context.sin, *context.attention]


def _unflatten(tensors: Sequence[Tensor]) -> LayerContext:
    return LayerContext(tensors[0], tensors[1], tuple(tensors[2:]))


def _position(layer: nn.Module) -> Position | None:
    """Return the position of a layer's dropout; None if it is off or there is none."""
    found = (m.position for m in layer.modules() if isinstance(m, CounterDropout))
    return next(found, None)


@contextmanager
def _positioned(
    layer: nn.Module, tensors: Sequence[Tensor], has_position: bool
) -> Iterator[LayerContext]:
    """Return the context from a loop's tensors; the layer's dropout has their position inside.

    Args:
        tensors: those of the position, if it has one, then those of the context.
    """
    if not has_position:
        yield _unflatten(tensors)
        return
    count, outside = len(Position._fields), _position(layer)
    try:
        set_position(layer, Position(*tensors[:count]))
        yield _unflatten(tensors[count:])
    finally:
        set_position(layer, outside)


class ScannedLayers(nn.Module):
    """The stack as one loop. `stacked` has a layer's parameter names, each tensor [layers, ...].

    Raises:
        ConfigError: layers with different parameters, such as an adapter on some of them.
    """

    def __init__(self, layers: Sequence[nn.Module], runner: LayerRunner) -> None:
        super().__init__()
        _check_equal(layers)
        self.depth = len(layers)
        self.stacked = copy.deepcopy(layers[0])
        for module in self.stacked.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                shape = (self.depth, *parameter.shape)
                stack = nn.Parameter(parameter.new_empty(shape), parameter.requires_grad)
                setattr(module, name, stack)
        # The runner is no module: its template is code, not weights.
        self.runner = runner

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        weights = [p for _, p in self.stacked.named_parameters()]
        if torch.is_grad_enabled():
            return _Scan.apply(self.runner, context, x, *weights)  # type: ignore[no-any-return]

        def body(carry: Sequence[Tensor], layer: Sequence[Tensor]):
            h, *rest = carry
            return [self.runner.call(h, layer, _unflatten(rest)), *rest], []

        return device_loop(body, [x, *_flatten(context)], weights)[0][0]

    def templates(self) -> list[nn.Module]:
        """Return the layers whose code is executed."""
        return [self.runner.template]

    def with_cache(
        self, x: Tensor, context: LayerContext, cache: Any
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run `forward` with a KV cache; the cache, keys and values are stacked like the
        weights."""
        template = self.runner.template
        core: Any = template.get_submodule("self_attn.core")
        kept = [] if cache is None else [*cache.keys, *cache.values]
        weights = [p for _, p in self.stacked.named_parameters()]
        turned = {
            name: module.transposed
            for name, module in self.stacked.named_modules()
            if isinstance(module, XlaLinear) and module.transposed is not None
        }
        linears: list[Any] = [template.get_submodule(name) for name in turned]
        first, second = len(kept), len(kept) + len(weights)

        def body(carry: Sequence[Tensor], layer: Sequence[Tensor]):
            h, *rest = carry
            core.cache = tuple(layer[:first]) or None
            for linear, weight in zip(linears, layer[second:], strict=True):
                linear.transposed = weight
            h = self.runner.call(h, layer[first:second], _unflatten(rest))
            return [h, *rest], list(core.new)

        stacks = [*kept, *weights, *turned.values()]
        try:
            carry, (keys, values) = device_loop(body, [x, *_flatten(context)], stacks)
        finally:
            for linear in linears:
                linear.transposed = None
        return carry[0], [keys], [values]


def _check_equal(layers: Sequence[nn.Module]) -> None:
    first, *others = (
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in layer.named_parameters()}
        for layer in layers
    )
    for number, other in enumerate(others, start=1):
        different = sorted(dict(first.items() ^ other.items()))
        if different:
            raise ConfigError(
                "remat.scan_layers: given true, but layers differ: layer 0 and layer "
                f"{number} in {different[0]}. A loop over layers needs equal ones: use "
                "remat.scan_layers=false, or adapt and train all layers alike."
            )


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

    if remat.scan_layers:
        model.model.layers = ScannedLayers(list(layers), runner(layers[0]))
        return
    input_has_gradient = model.model.embed_tokens.weight.requires_grad
    for index, layer in enumerate(layers):
        if not remat.keeps_everything:
            layers[index] = RematLayer(layer, runner(layer), remat.optimization_barrier)
        elif remat.optimization_barrier and input_has_gradient:
            layer.register_full_backward_hook(_barrier_after)
        input_has_gradient |= any(p.requires_grad for p in layer.parameters())


def _barrier_after(_: nn.Module, grad_input: Any, __: Any) -> None:
    xm.optimization_barrier_([g for g in grad_input if g is not None])
