"""One layer as a function of (hidden, weights, context), forward and backward.

The forward stores the tensors that the config names. The backward traces the layer again, fetching
stored values and recomputing the rest. Since XLA tensors are lazy, a fetched value makes the code
that would recompute it dead: storing the outputs of the matrix products saves all but the attention
scores, storing nothing is full remat.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla.experimental.stablehlo_custom_call import place_to_device, place_to_host

from torchprime.config.sections.remat import LAYER_INPUT, RematConfig
from torchprime.models.decoder import LayerContext, output_module


def modules_of(name: str, layer: nn.Module) -> list[str]:
    """Return the modules of a layer whose outputs are kept for a name. An attention kernel has one
    for each result that its backward needs."""
    module = output_module(name, layer)
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
        # A fused projection is kept if one of its outputs is, at the place of the first.
        first: dict[str, str] = {}
        for name in remat.kept_outputs:
            for module in modules_of(name, template):
                first.setdefault(module, name)
        kept = list(first.items())
        self.kept_names = [module for module, _ in kept]
        # The module by which an output is annotated: the core's for each of its results.
        self.owners = {module: output_module(name, template) for module, name in kept}
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


def behind_barrier(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors behind one optimization barrier: all of them are computed before
    anything that reads one.

    A backward reads its layer's inputs and its gradient behind one. The compiler then can't
    recognize that the forward was computed before, so it does not keep the first one's activations
    alive to reuse them; and it can't start before the gradient is there.
    """
    behind = [tensor.clone() for tensor in tensors]
    xm.optimization_barrier_(behind)
    return behind
