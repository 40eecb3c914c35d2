"""Loops over the layers, on the device.

A group of layers that repeats, such as one layer or Gemma 3's five local and one global, is one
loop: its body runs the layers of one repeat. Each parameter of a layer in the body is one stacked
tensor [repeats, ...], so compile time does not grow with depth and no per-step stacking is paid.
Layers that do not repeat are called between the loops.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchprime.adapters.dropout import CounterDropout, set_position
from torchprime.counter_bits import Position
from torchprime.errors import ConfigError
from torchprime.models.decoder import LayerContext, with_cache
from torchprime.models.layer_kinds import Group
from torchprime.torch_xla_models.layers.loops import device_loop
from torchprime.torch_xla_models.layers.runner import LayerRunner, behind_barrier
from torchprime.torch_xla_models.linear import XlaLinear


class LayerSequence:
    """Layers that a loop's body runs one after the other, as one function.

    Weights, kept tensors and gradients of all layers are in one list, in the layers' order.
    """

    def __init__(self, runners: Sequence[LayerRunner]) -> None:
        self.runners = runners
        self.templates = [runner.template for runner in runners]

    def call(self, x: Tensor, weights: Sequence[Tensor], context: LayerContext) -> Tensor:
        """Return the last layer's output, called normally."""
        for runner, own in zip(self.runners, self.weights_of(weights), strict=True):
            x = runner.call(x, own, context)
        return x

    def forward(
        self, x: Tensor, weights: Sequence[Tensor], context: LayerContext
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the last layer's output, and what each layer keeps for `backward`."""
        kept: list[Tensor] = []
        for runner, own in zip(self.runners, self.weights_of(weights), strict=True):
            x, of_layer = runner.forward(x, own, context)
            kept += runner.put_away(of_layer)
        return x, kept

    def backward(
        self,
        kept: Sequence[Tensor],
        weights: Sequence[Tensor],
        context: LayerContext,
        grad: Tensor,
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the gradients of the first layer's input and of all trained weights."""
        parts = _split(kept, [len(runner.offloaded) for runner in self.runners])
        gradients: list[Tensor] = []
        for index, (runner, of_layer, own) in reversed(
            list(enumerate(zip(self.runners, parts, self.weights_of(weights), strict=True)))
        ):
            of_layer = runner.fetch_back(of_layer)
            if index + 1 < len(self.runners):  # one layer's activations at a time
                *of_layer, grad = behind_barrier([*of_layer, grad])
            grad, of_weights = runner.backward(of_layer, own, context, grad)
            gradients = [*of_weights, *gradients]
        return grad, gradients

    def for_each(self, gradients: Sequence[Tensor]) -> list[Tensor | None]:
        """Return a gradient for each weight, None for a frozen one."""
        counts = [sum(runner.trained) for runner in self.runners]
        parts = zip(self.runners, _split(gradients, counts), strict=True)
        return [each for runner, own in parts for each in runner.for_each(own)]

    def weights_of(self, weights: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """Return each layer's part of the weights."""
        return _split(weights, [len(runner.names) for runner in self.runners])


def _split(values: Sequence[Tensor], counts: Sequence[int]) -> list[Sequence[Tensor]]:
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [values[end - count : end] for end, count in zip(ends, counts, strict=True)]


class _Scan(torch.autograd.Function):
    """A group of layers as one loop forward and one loop backward."""

    @staticmethod
    def forward(ctx, layers: LayerSequence, context: LayerContext, x: Tensor, *stacked: Tensor):  # type: ignore[override]
        ctx.layers, ctx.context = layers, context
        position = _position(layers.templates)
        flat = [*(position or ()), *context.flat()]
        ctx.has_position = position is not None

        def body(carry: Sequence[Tensor], weights: Sequence[Tensor]):
            h, *rest = carry
            with _positioned(layers.templates, rest, ctx.has_position) as tensors:
                out, kept = layers.forward(h, weights, context.with_tensors(tensors))
            return [out, *rest], kept

        carry, kept = device_loop(body, [x, *flat], stacked)
        ctx.save_for_backward(*flat, *kept, *stacked)
        ctx.sizes = len(flat), len(kept)
        return carry[0]

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        layers, context = ctx.layers, ctx.context
        context_size, kept_size = ctx.sizes
        tensors = list(ctx.saved_tensors)
        flat, stacks = tensors[:context_size], tensors[context_size:]

        def body(carry: Sequence[Tensor], xs: Sequence[Tensor]):
            g, *rest = carry
            kept, weights = xs[:kept_size], xs[kept_size:]
            with _positioned(layers.templates, rest, ctx.has_position) as tensors:
                own = context.with_tensors(tensors)
                grad_x, grad_weights = layers.backward(kept, weights, own, g)
            return [grad_x, *rest], grad_weights

        carry, grads = device_loop(body, [grad, *flat], stacks, reverse=True)
        return None, None, carry[0], *layers.for_each(grads)


def _position(layers: Sequence[nn.Module]) -> Position | None:
    """Return the position of the layers' dropout; None if it is off or there is none."""
    modules = (module for layer in layers for module in layer.modules())
    return next((m.position for m in modules if isinstance(m, CounterDropout)), None)


@contextmanager
def _positioned(
    layers: Sequence[nn.Module], tensors: Sequence[Tensor], has_position: bool
) -> Iterator[Sequence[Tensor]]:
    """Return the context's tensors from a loop's; inside, the layers' dropout has the position.

    Args:
        tensors: those of the position, if it has one, then those of the context.
    """
    if not has_position:
        yield tensors
        return
    count, outside = len(Position._fields), _position(layers)

    def set_all(position: Position | None) -> None:
        for layer in layers:
            set_position(layer, position)

    try:
        set_all(Position(*tensors[:count]))
        yield tensors[count:]
    finally:
        set_all(outside)


# The name of a stack in its container -------------------------------------------------------------

STACKED = "stacked"
_STACK = re.compile(rf"layers\.{STACKED}(?:_(\d+)_(\d+))?\.")


def _stack_name(group: Group, place: int) -> str:
    first, step = group.first + place, group.period
    return STACKED if (first, step) == (0, 1) else f"{STACKED}_{first}_{step}"


def names_in_stack(name: str, depth: int) -> tuple[str, ...] | None:
    """Return the checkpoint's names of a stacked parameter's layers; None if it is not stacked.

    Args:
        name: of the model's parameter.
        depth: the parameter's first dim.
    """
    found = _STACK.search(name)
    if found is None:
        return None
    first, step = int(found[1] or 0), int(found[2] or 1)
    layers = range(first, first + step * depth, step)
    return tuple(name.replace(found[0], f"layers.{layer}.") for layer in layers)


# The container ------------------------------------------------------------------------------------


class _Loop(NamedTuple):
    """A group of layers that is run as a loop.

    Attributes:
        sequence: the code of the body.
        stacks: the weights, a module for each layer of the body; each tensor is [repeats, ...].
    """

    sequence: LayerSequence
    stacks: list[nn.Module]

    def weights(self) -> list[Tensor]:
        return [p for stack in self.stacks for _, p in stack.named_parameters()]


class ScannedLayers(nn.Module):
    """The stack of layers as loops over its groups.

    A stack `stacked_A_B` has the parameters of the layers A, A + B, ..., by their names in a layer;
    `stacked` those of 0, 1, .... A layer that does not repeat has its number as name.

    Args:
        groups: of the layers, in their order.
        runner: makes the code of one layer in a loop.
        single: makes a layer that does not repeat.

    Raises:
        ConfigError: layers at one place of a group with different parameters, such as an adapter on
            some of them.
    """

    def __init__(
        self,
        layers: Sequence[nn.Module],
        groups: Sequence[Group],
        runner: Callable[[nn.Module], LayerRunner],
        single: Callable[[nn.Module], nn.Module],
    ) -> None:
        super().__init__()
        self.parts: list[_Loop | nn.Module] = []
        for group in groups:
            if group.repeats == 1:
                layer = single(layers[group.first])
                self.add_module(str(group.first), layer)
                self.parts.append(layer)
                continue
            stacks = []
            for place in range(group.period):
                stacks.append(_stacked(layers, group.stack(place)))
                self.add_module(_stack_name(group, place), stacks[-1])
            code = layers[group.first : group.first + group.period]
            self.parts.append(_Loop(LayerSequence([runner(layer) for layer in code]), stacks))

    def forward(self, x: Tensor, context: LayerContext) -> Tensor:
        for part in self.parts:
            if isinstance(part, nn.Module):
                x = part(x, context)
            elif torch.is_grad_enabled():
                x = _Scan.apply(part.sequence, context, x, *part.weights())  # type: ignore
            else:
                x = _without_gradients(part, x, context)
        return x

    def templates(self) -> list[nn.Module]:
        """Return the layers whose code is executed."""
        return [
            layer
            for part in self.parts
            for layer in ([part] if isinstance(part, nn.Module) else part.sequence.templates)
        ]

    def with_cache(
        self, x: Tensor, context: LayerContext, cache: Any
    ) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Run `forward` with a KV cache. Keys and values of a loop are stacked like its weights,
        one entry for each layer of its body."""
        keys, values = [], []
        for part in self.parts:
            count = 1 if isinstance(part, nn.Module) else len(part.stacks)
            here = slice(len(keys), len(keys) + count)
            old = None if cache is None else (cache.keys[here], cache.values[here])
            if isinstance(part, nn.Module):
                own = None if old is None else (old[0][0], old[1][0])
                x, (key, value) = with_cache(part, x, context, own)
                new = [key], [value]
            else:
                x, *new = _loop_with_cache(part, x, context, old)
            keys += new[0]
            values += new[1]
        return x, keys, values


def _stacked(layers: Sequence[nn.Module], numbers: range) -> nn.Module:
    """Return a layer whose parameters have room for those of several."""
    _check_equal(layers, numbers)
    stack = copy.deepcopy(layers[numbers[0]])
    for module in stack.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            room = parameter.new_empty((len(numbers), *parameter.shape))
            setattr(module, name, nn.Parameter(room, parameter.requires_grad))
    return stack


def _without_gradients(loop: _Loop, x: Tensor, context: LayerContext) -> Tensor:
    def body(carry: Sequence[Tensor], weights: Sequence[Tensor]):
        h, *rest = carry
        return [loop.sequence.call(h, weights, context.with_tensors(rest)), *rest], []

    return device_loop(body, [x, *context.flat()], loop.weights())[0][0]


def _loop_with_cache(
    loop: _Loop, x: Tensor, context: LayerContext, cache: tuple[Sequence[Tensor], ...] | None
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Return the output, and new keys and values for each layer of the body, stacked.

    Args:
        cache: keys, then values, for each layer of the body; each [repeats, B, K, C, h].
    """
    period, sequence = len(loop.stacks), loop.sequence
    cores: list[Any] = [layer.get_submodule("self_attn.core") for layer in sequence.templates]
    kept = [] if cache is None else [*cache[0], *cache[1]]
    weights = loop.weights()
    turned, linears = _transposed(loop)
    first, second = len(kept), len(kept) + len(weights)

    def body(carry: Sequence[Tensor], xs: Sequence[Tensor]):
        h, *rest = carry
        for index, core in enumerate(cores):
            core.cache = (xs[index], xs[period + index]) if kept else None
        for linear, weight in zip(linears, xs[second:], strict=True):
            linear.transposed = weight
        h = sequence.call(h, xs[first:second], context.with_tensors(rest))
        return [h, *rest], [core.new[part] for part in (0, 1) for core in cores]

    try:
        carry, new = device_loop(body, [x, *context.flat()], [*kept, *weights, *turned])
    finally:
        for linear in linears:
            linear.transposed = None
    return carry[0], new[:period], new[period:]


def _transposed(loop: _Loop) -> tuple[list[Tensor], list[Any]]:
    """Return the stacks' transposed weights, and the linear layers of the body that use them."""
    turned, linears = [], []
    for stack, template in zip(loop.stacks, loop.sequence.templates, strict=True):
        for name, module in stack.named_modules():
            if isinstance(module, XlaLinear) and module.transposed is not None:
                turned.append(module.transposed)
                linears.append(template.get_submodule(name))
    return turned, linears


def _check_equal(layers: Sequence[nn.Module], numbers: range) -> None:
    first, *others = (
        {name: (p.shape, p.dtype, p.requires_grad) for name, p in layers[number].named_parameters()}
        for number in numbers
    )
    for number, other in zip(numbers[1:], others, strict=True):
        different = sorted(dict(first.items() ^ other.items()))
        if different:
            raise ConfigError(
                f"remat.scan_layers: given true, but layers differ: layer {numbers[0]} and layer "
                f"{number} in {different[0]}. A loop over layers needs equal ones: use "
                "remat.scan_layers=false, or adapt and train all layers alike."
            )
