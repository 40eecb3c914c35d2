"""Decoder layers that gather their weights when they run, and run again in the backward.

A layer's weights are parts on each chip. The forward gathers them, computes and forgets them; the
backward gathers them again, repeats the forward from the layer's input and differentiates it. So a
step gathers each weight twice and scatters each gradient once.

Along `tensor` linear layers stay cut, as the sharding table says: along their outputs (each chip
has some heads) or along their inputs (outputs are summed). Those of shares.py are gathered whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from torchprime.adapters.dropout import CounterDropout, set_position
from torchprime.adapters.lora import AdaptedLinear
from torchprime.errors import ConfigError
from torchprime.models.architecture import Architecture
from torchprime.torch_native.tpu.collectives import Gather, barrier, copied, summed
from torchprime.torch_native.tpu.grid import TENSOR, Cut, Grid
from torchprime.torch_native.tpu.loops import Loop, traced_loop
from torchprime.torch_native.tpu.shares import (
    Share,
    by_parameter,
    kv_heads,
    place_along_tensor,
    shares,
)

Pair = tuple[Tensor, Tensor]  # keys and values of a layer
TRAINED, BASE = "trained", "base"  # uses of a stack in one program; their loops differ

# Norms of the heads: a chip along `tensor` computes only its own heads.
PER_HEAD = ("q_norm", "k_norm")


@dataclass(frozen=True)
class TensorCut:
    """A layer's computation along `tensor`.

    Attributes:
        shares: of the layer's parameters by name; a parameter without one stays cut.
        dropouts: those whose input is a part of each token, and the part's number of entries.
    """

    shares: Mapping[str, Share]
    dropouts: Sequence[tuple[CounterDropout, int]] = ()

    @property
    def by_place(self) -> bool:
        """True if the computation depends on the chip's place along `tensor`."""
        return bool(self.shares or self.dropouts)


def cut_along_tensor(layer: nn.Module, cuts: Mapping[str, Cut], a: Architecture) -> TensorCut:
    """Make a layer compute with linear layers that are cut along `tensor`.

    Args:
        cuts: of the layer's parameters by name.

    Raises:
        ConfigError: parts of a dropout's input that cannot be numbered.
    """
    copies, size = _Copies(), next(iter(cuts.values())).grid.tensor
    own = by_parameter(shares(a, size))
    for name, module in layer.named_modules():
        cut = cuts.get(f"{name}.weight")
        if not isinstance(module, nn.Linear) or cut is None:
            continue
        if TENSOR in cut.dims[0] or f"{name}.weight" in own:
            module.register_forward_pre_hook(copies)
        elif TENSOR in cut.dims[1]:
            module.forward = partial(_summed_linear, module)  # pyright: ignore[reportAttributeAccessIssue]
    if a.fused_qkv:
        attention: Any = layer.get_submodule("self_attn")
        heads = (a.num_attention_heads // size, *[kv_heads(a, size)] * 2)
        attention.parts = [a.head_dim * count for count in heads]
    return TensorCut(
        {name: own[name] for name in cuts if name in own}, _dropouts(layer, cuts, size)
    )


def _dropouts(
    layer: nn.Module, cuts: Mapping[str, Cut], size: int
) -> list[tuple[CounterDropout, int]]:
    """Return the dropouts whose input is cut, and the number of entries of a part."""
    found = []
    for name, module in layer.named_modules():
        if not isinstance(module, AdaptedLinear) or not module.lora_dropout.probability:
            continue
        if TENSOR not in cuts[f"{name}.lora_A.weight"].dims[1]:
            continue
        part = module.lora_A.in_features // size
        if part % 2:
            raise ConfigError(
                f"adapter.dropout: given {module.lora_dropout.probability:g} with ici_mesh.tensor="
                f"{size}, expected 0: the inputs of {name} are cut into parts of {part}, which is "
                "odd. Use the fsdp axis instead."
            )
        found.append((module.lora_dropout, part))
    return found


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


def layer_gather(name: str, cut: Cut, tensor: TensorCut) -> Gather:
    """Return the gather of a layer's parameter: along all axes but `tensor`, or along all."""
    if name in tensor.shares:
        return Gather.of(cut, partial=True)
    partial_gradient = cut.grid.tensor > 1 and any(part in name for part in PER_HEAD)
    return Gather.of(cut, keep=(TENSOR,), partial=partial_gradient)


@dataclass(frozen=True)
class GatheredLayer:
    """A layer without storage, to be called with parts of its weights.

    Attributes:
        gathers: by parameter name, in the order of the parts.
        trained: whether each part gets a gradient.
        tensor: the computation along `tensor`.
    """

    layer: nn.Module
    gathers: Mapping[str, Gather]
    trained: Sequence[bool]
    tensor: TensorCut

    def __call__(self, x: Tensor, parts: Sequence[Tensor], inputs: Any) -> Tensor:
        """Return the layer's output.

        Args:
            inputs: (context, position of dropout, place along `tensor`), () for none.
        """
        context, position, place = inputs
        set_position(self.layer, position or None)
        named = zip(self.gathers.items(), parts, strict=True)
        weights = {name: gather(part) for (name, gather), part in named}
        weights |= {n: share.of(weights[n], place) for n, share in self.tensor.shares.items()}
        for dropout, part in self.tensor.dropouts:
            dropout.first = place * part
        return functional_call(self.layer, weights, (x, context))

    def with_cache(
        self, x: Tensor, parts: Sequence[Tensor], inputs: Any, cache: Pair | None
    ) -> tuple[Tensor, Pair]:
        """Return the layer's output and its new keys and values, while a core of
        generation/cache.py is installed.

        Args:
            cache: the layer's keys and values; None during prefill.
        """
        core: Any = self.layer.get_submodule("self_attn.core")
        core.cache = cache
        x = self(x, parts, inputs)
        return x, core.new

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
        use: of the loops by which the next forward runs: TRAINED or BASE.
        seen: inputs of the last forward, (hidden, inputs); a forward that only looks sets them.
        seen_cache: the same of `with_cache`, and a layer's keys and values if there are any.
    """

    def __init__(
        self, layers: Sequence[GatheredLayer], grid: Grid, *, scan: bool, remat: bool
    ) -> None:
        super().__init__()
        self._layers, self.grid = layers, grid
        self.scan, self.remat = scan, remat
        self.parts: Sequence[Tensor] = ()
        self.loops: dict[str, tuple[Loop, Loop | None]] = {}
        self.use = TRAINED
        self.looking = False
        self.seen: tuple[Tensor, Any] | None = None
        self.seen_cache: tuple[Tensor, Any, list[Tensor]] | None = None
        self.cache_loop: Loop | None = None

    def templates(self) -> list[nn.Module]:
        """Return the layers whose code is executed."""
        return [each.layer for each in (self._layers[:1] if self.scan else self._layers)]

    def forward(self, x: Tensor, context: Any) -> Tensor:
        """Return the last layer's output."""
        inputs = (context, position_in(self.templates()[0]), self._place())
        if self.looking:
            self.seen = x, inputs
            return x
        if self.scan:
            return _Scanned.apply(self, inputs, x, *self.parts)  # pyright: ignore[reportReturnType]
        for number, layer in enumerate(self._layers):
            x = self._run(layer, inputs, x, self._parts_of(number))
        return x

    def _place(self) -> Any:
        """Return the place along `tensor`, or () if no layer depends on it."""
        by_place = any(layer.tensor.by_place for layer in self._layers)
        return place_along_tensor(self.grid) if by_place else ()

    def _parts_of(self, number: int) -> list[Tensor]:
        """Return the parts of a layer's weights."""
        if self.scan:
            return [part[number] for part in self.parts]
        size = len(self.parts) // len(self._layers)
        return list(self.parts[number * size : (number + 1) * size])

    def with_cache(
        self, x: Tensor, context: Any, cache: Any
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run as `LayerStack.with_cache` does. Layers in a loop have their keys and values in one
        stack."""
        inputs = (context, (), self._place())
        if self.scan:
            x, (keys, values) = self._scan_cache(x, inputs, cache)
            return x, [keys], [values]
        found: list[Pair] = []
        for number, layer in enumerate(self._layers):
            old = None if cache is None else (cache.keys[number], cache.values[number])
            x, new = layer.with_cache(x, self._parts_of(number), inputs, old)
            found.append(new)
        return x, [key for key, _ in found], [value for _, value in found]

    def _scan_cache(self, x: Tensor, inputs: Any, cache: Any) -> tuple[Tensor, list[Tensor]]:
        rows = [] if cache is None else [cache.keys[0], cache.values[0]]
        if not self.looking:
            assert self.cache_loop is not None
            leaves = pytree.tree_leaves(inputs)
            (out,), found = self.cache_loop([x], [*self.parts, *rows], leaves)
            return out, found
        first = [row[0] for row in rows]
        self.seen_cache = x, inputs, first
        old = (first[0], first[1]) if first else None
        _, new = self._layers[0].with_cache(x, self._parts_of(0), inputs, old)
        return x, [each.expand(len(self._layers), *each.shape).clone() for each in new]

    def _run(self, layer: GatheredLayer, inputs: Any, x: Tensor, parts: Sequence[Tensor]) -> Tensor:
        if not self.remat:
            return layer(x, parts, inputs)
        return _Again.apply(layer, inputs, x, *parts)  # pyright: ignore[reportReturnType]

    @contextmanager
    def used(self, use: str) -> Iterator[None]:
        """Run by the loops of another use inside."""
        self.use, before = use, self.use
        yield
        self.use = before

    @contextmanager
    def traced_for(self) -> Iterator[None]:
        """Let the model run once inside without its layers, on tensors without storage; then trace
        the loops over layers for what it passed to them."""
        self.seen = self.seen_cache = None
        self.looking = self.scan
        yield
        self.looking = False
        if self.seen is not None:
            self.loops[self.use] = self._traced_loops()
        if self.seen_cache is not None:
            self._trace_cache_loop()

    def _trace_cache_loop(self) -> None:
        assert self.seen_cache is not None
        x, inputs, old = self.seen_cache
        layer, (leaves, tree) = self._layers[0], pytree.tree_flatten(inputs)
        count, end = len(layer.trained), len(layer.trained) + len(old)

        def body(x: Tensor, *given: Tensor) -> list[Tensor]:
            cache = (given[count], given[count + 1]) if old else None
            again = pytree.tree_unflatten(list(given[end:]), tree)
            out, new = layer.with_cache(x, given[:count], again, cache)
            return [out, *(each.clone() for each in new)]

        rows = [*self._parts_of(0), *old]
        self.cache_loop = traced_loop(body, [x], rows, leaves)

    def _traced_loops(self) -> tuple[Loop, Loop | None]:
        """Return the loops of forward and backward. The base has none for the backward: it gets no
        gradient, and its adapters are off."""
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
        there = traced_loop(forward, [x], rows, leaves)
        if self.use == BASE:
            return there, None
        return there, traced_loop(backward, [x], [x, *rows], leaves, reverse=True)


def position_in(layer: nn.Module) -> Any:
    """Return the position that the layer's dropout has. It is () without any, since a loop's inputs
    are tensors."""
    found = (m.position for m in layer.modules() if isinstance(m, CounterDropout))
    return next(found, None) or ()


class _Scanned(torch.autograd.Function):
    """A stack of layers with equal structure, as a loop over them in each direction."""

    @staticmethod
    def forward(ctx: Any, stack: GatheredStack, inputs: Any, x: Tensor, *parts: Tensor) -> Tensor:
        ctx.stack, ctx.leaves = stack, pytree.tree_leaves(inputs)
        forward, ctx.loop = stack.loops[stack.use]
        (out,), (saved,) = forward([x], parts, ctx.leaves)
        ctx.save_for_backward(saved, *parts)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, *parts = ctx.saved_tensors
        (of_x,), found = ctx.loop([grad], [saved, *parts], ctx.leaves)
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
