"""Programs that read the weights and change nothing: held-out loss, logits.

Their inputs are the parts of all parameters, the model's constants, and then the program's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.torch_native.tpu.collectives import all_reduce
from torchprime.torch_native.tpu.grid import BATCH
from torchprime.torch_native.tpu.loops import traced, traced_loop
from torchprime.torch_native.tpu.parameters import Parts
from torchprime.torch_native.tpu.step import Input, StepGraph, spread_of
from torchprime.training.step import forward_sums, loss_of

# The program's own inputs -> its results.
Function = Callable[[Sequence[Tensor]], list[Tensor]]
# State and what stays -> the next state, then a row of the result.
Body = Callable[[Sequence[Tensor], Sequence[Tensor]], list[Tensor]]


def weight_inputs(parts: Parts) -> list[Input]:
    """Return the inputs of every program here: parameters, then constants."""
    found = [Input(f"model.{each.name}", each.part, each.dtype, False) for each in parts.held]
    buffers = parts.buffers.items()
    return found + [Input(name, tuple(b.shape), b.dtype, False) for name, b in buffers]


def build(parts: Parts, own: Sequence[Input], function: Function) -> StepGraph:
    """Trace a program.

    Args:
        own: the inputs besides the weights. The memory of donated ones passes to the results after
            the first.
        function: runs the model on the program's own inputs.
    """
    inputs = [*weight_inputs(parts), *own]

    def whole(*tensors: Tensor) -> list[Tensor]:
        return _call(parts, [each.clone() for each in tensors], function)

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty(each.shape, dtype=each.dtype) for each in inputs]
        with parts.stack.traced_for():
            whole(*fakes)
    return StepGraph(traced(whole, fakes), inputs, parts.held, parts.grid)


def _call(parts: Parts, tensors: Sequence[Tensor], function: Function) -> list[Tensor]:
    """Run the model on tensors in the order of `weight_inputs`; those after them are the
    function's."""
    rest = list(tensors)
    given = {each.name: rest.pop(0) for each in parts.held}
    buffers = {name: rest.pop(0) for name in parts.buffers}
    with torch.no_grad():
        return parts.call(given, buffers, partial(function, rest))


def held_out_loss(parts: Parts, chunks: int | None, num_sources: int) -> Function:
    """Return the function from a batch's fields, [1, b, S], to the sums of an eval step, over all
    chips: fp32 [loss sum, weight sum, then the loss sum by source]."""
    cross_entropy = partial(chunked_cross_entropy, chunks=chunks, spread=spread_of(parts))

    def function(fields: Sequence[Tensor]) -> list[Tensor]:
        first = [field[0] for field in fields]
        sums = forward_sums(loss_of(parts.model, first, cross_entropy), first, num_sources)
        return [all_reduce(sums, parts.grid.several(BATCH))]

    return function


def logits_of_one(parts: Parts) -> Function:
    """Return the function from one sequence's token ids, int32 [1, S], to its logits, fp32 [S, V].
    Every chip computes the same."""

    def function(own: Sequence[Tensor]) -> list[Tensor]:
        (ids,) = own
        positions = torch.arange(ids.shape[1], dtype=torch.int32)[None]
        return [parts.model.logits(ids, positions, torch.ones_like(ids))[0].float()]

    return function


def build_loop(
    parts: Parts, state: Sequence[Input], fixed: Sequence[Input], body: Body, *, length: int
) -> StepGraph:
    """Trace a program that runs the model `length` times, with the memory of its state reused.

    Args:
        state: inputs that each iteration passes to the next one.
        fixed: inputs that every iteration reads.
        body: (state, fixed) -> the next state, then one row of the program's first result.
    """
    named = weight_inputs(parts)
    inputs = [*named, *state, *fixed]
    count = len(state)

    def once(*tensors: Tensor) -> list[Tensor]:
        carried, rest = tensors[:count], tensors[count + 1 :]  # a row of ticks between
        return _call(parts, rest, partial(body, carried))

    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty(each.shape, dtype=each.dtype) for each in inputs]
        weights, own = fakes[: len(named)], fakes[len(named) :]
        tick = torch.empty(())
        with parts.stack.traced_for():
            once(*own[:count], tick, *weights, *own[count:])
    constants = [*weights, *own[count:]]
    loop = traced_loop(once, own[:count], [tick], constants)

    def whole(*tensors: Tensor) -> list[Tensor]:
        given = [each.clone() for each in tensors]
        weights, own = given[: len(named)], given[len(named) :]
        ticks = torch.zeros(length)
        carried, (made,) = loop(own[:count], [ticks], [*weights, *own[count:]])
        return [made, *carried]

    return StepGraph(traced(whole, fakes), inputs, parts.held, parts.grid)
