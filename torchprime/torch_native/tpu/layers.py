"""Decoder layers that gather their weights when they run, and run again in the backward.

A layer's weights are parts on each chip. The forward gathers them, computes and forgets them; the
backward gathers them again, repeats the forward from the layer's input and differentiates it. So a
step gathers each weight twice and scatters each gradient once.

Along `tensor` linear layers stay cut, as the sharding table says: along their outputs (each chip
has some heads) or along their inputs (outputs are summed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from torchprime.adapters.dropout import CounterDropout, set_position
from torchprime.torch_native.tpu.collectives import Gather, barrier, copied, summed
from torchprime.torch_native.tpu.grid import TENSOR, Cut
from torchprime.torch_native.tpu.loops import Loop, traced_loop

# Norms of the heads: a chip along `tensor` computes only its own heads.
PER_HEAD = ("q_norm", "k_norm")


def cut_along_tensor(layer: nn.Module, cuts: Mapping[str, Cut]) -> None:
    """Make a layer compute with linear layers that are cut along `tensor`.

    Args:
        cuts: of the layer's parameters by name.
    """
    copies = _Copies()
    for name, module in layer.named_modules():
        cut = cuts.get(f"{name}.weight")
        if not isinstance(module, nn.Linear) or cut is None:
            continue
        if TENSOR in cut.dims[0]:
            module.register_forward_pre_hook(copies)
        elif TENSOR in cut.dims[1]:
            module.forward = partial(_summed_linear, module)  # pyright: ignore[reportAttributeAccessIssue]


class _Copies:
    """A hook that gives linear layers with the same input one copy of it, so that the chips
    exchange its gradient once."""

    def __init__(self) -> None:
        self.last: tuple[Tensor, Tensor] | None = None

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        if self.last is None or self.last[0] is not args[0]:
            self.last = args[0], copied(args[0])
        return (self.last[1],)


def _summed_linear(module: nn.Linear, x: Tensor) -> Tensor:
    out = summed(F.linear(x, module.weight))
    return out if module.bias is None else out + module.bias


def layer_gather(name: str, cut: Cut) -> Gather:
    """Return the gather of a layer's parameter: along all axes but `tensor`."""
    partial_gradient = cut.grid.tensor > 1 and any(part in name for part in PER_HEAD)
    return Gather.of(cut, keep=(TENSOR,), partial=partial_gradient)


@dataclass(frozen=True)
class GatheredLayer:
    """A layer without storage, to be called with parts of its weights.

    Attributes:
        gathers: by parameter name, in the order of the parts.
        trained: whether each part gets a gradient.
    """

    layer: nn.Module
    gathers: Mapping[str, Gather]
    trained: Sequence[bool]

    def __call__(self, x: Tensor, parts: Sequence[Tensor], inputs: Any) -> Tensor:
        """Return the layer's output.

        Args:
            inputs: (context, position of dropout; () without one).
        """
        context, position = inputs
        set_position(self.layer, position or None)
        named = zip(self.gathers.items(), parts, strict=True)
        weights = {name: gather(part) for (name, gather), part in named}
        return functional_call(self.layer, weights, (x, context))

    def gradients(
        self, grad: Tensor, x: Tensor, parts: Sequence[Tensor], inputs: Any
    ) -> list[Tensor]:
        """Return the gradients of the input and of each trained part, after a second forward."""
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            pairs = zip(parts, self.trained, strict=True)
            leaves = [part.detach().requires_grad_(trained) for part, trained in pairs]
            out = self(x, leaves, inputs)
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            return list(torch.autograd.grad(out, [x, *wanted], grad))

    def every(self, found: Sequence[Tensor]) -> Iterator[Tensor | None]:
        """Yield a gradient for each part, None if it is frozen, from those of the trained ones."""
        rest = iter(found)
        return (next(rest) if trained else None for trained in self.trained)


class GatheredStack(nn.Module):
    """The container that chains the layers.

    Attributes:
        parts: of the layers' weights; the step sets them. Stacked, or one list after another.
        seen: inputs of the last forward, (hidden, inputs); a forward that only looks sets them.
    """

    def __init__(self, layers: Sequence[GatheredLayer], *, scan: bool, remat: bool) -> None:
        super().__init__()
        self._layers = layers
        self.scan, self.remat = scan, remat
        self.parts: Sequence[Tensor] = ()
        self.loops: tuple[Loop, Loop] | None = None
        self.looking = False
        self.seen: tuple[Tensor, Any] | None = None

    def templates(self) -> list[nn.Module]:
        """Return the layers whose code is executed."""
        return [each.layer for each in (self._layers[:1] if self.scan else self._layers)]

    def forward(self, x: Tensor, context: Any) -> Tensor:
        """Return the last layer's output."""
        inputs = (context, position_in(self.templates()[0]))
        if self.looking:
            self.seen = x, inputs
            return x
        if self.scan:
            return _Scanned.apply(self, inputs, x, *self.parts)  # pyright: ignore[reportReturnType]
        size = len(self.parts) // len(self._layers)
        for number, layer in enumerate(self._layers):
            parts = self.parts[number * size : (number + 1) * size]
            x = self._run(layer, inputs, x, parts)
        return x

    def _run(self, layer: GatheredLayer, inputs: Any, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        if not self.remat:
            return layer(x, parts, inputs)
        return _Again.apply(layer, inputs, x, *parts)  # pyright: ignore[reportReturnType]

    def trace_loops(self) -> None:
        """Trace the bodies of both loops, for inputs like those that a forward saw."""
        assert self.seen is not None
        x, inputs = self.seen
        layer, (leaves, tree) = self._layers[0], pytree.tree_flatten(inputs)
        count = len(layer.trained)

        def again(given: Sequence[Tensor]) -> tuple[Sequence[Tensor], Any]:
            return given[:count], pytree.tree_unflatten(list(given[count:]), tree)

        def forward(x: Tensor, *given: Tensor) -> list[Tensor]:
            return [layer(x, *again(given)), x.clone()]

        def backward(grad: Tensor, x: Tensor, *given: Tensor) -> list[Tensor]:
            return layer.gradients(grad, x, *again(given))

        rows = [part[0] for part in self.parts]
        self.loops = (
            traced_loop(forward, [x], rows, leaves),
            traced_loop(backward, [x], [x, *rows], leaves, reverse=True),
        )


def position_in(layer: nn.Module) -> Any:
    """Return the position that the layer's dropout has. It is () without any, since a loop's inputs
    are tensors."""
    found = (m.position for m in layer.modules() if isinstance(m, CounterDropout))
    return next(found, None) or ()


class _Scanned(torch.autograd.Function):
    """A stack of layers with equal structure, as a loop over them in each direction."""

    @staticmethod
    def forward(ctx: Any, stack: GatheredStack, inputs: Any, x: Tensor, *parts: Tensor) -> Tensor:
        assert stack.loops is not None
        ctx.stack, ctx.leaves = stack, pytree.tree_leaves(inputs)
        (out,), (saved,) = stack.loops[0]([x], parts, ctx.leaves)
        ctx.save_for_backward(saved, *parts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, *parts = ctx.saved_tensors
        (of_x,), found = ctx.stack.loops[1]([grad], [saved, *parts], ctx.leaves)
        return None, None, of_x, *ctx.stack._layers[0].every(found)


class _Again(torch.autograd.Function):
    """One layer, which runs again in the backward."""

    @staticmethod
    def forward(ctx: Any, layer: GatheredLayer, inputs: Any, x: Tensor, *parts: Tensor) -> Tensor:
        ctx.layer, ctx.inputs = layer, inputs
        ctx.save_for_backward(x, *parts)
        return layer(x, parts, inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Without the barrier the compiler would keep the first forward's values for it.
        grad, x, *parts = barrier([grad, *ctx.saved_tensors])
        of_x, *found = ctx.layer.gradients(grad, x, parts, ctx.inputs)
        return None, None, of_x, *ctx.layer.every(found)
