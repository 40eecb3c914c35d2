"""Loops on the device as operations of the step's graph.

A loop's body is a graph of its own, traced once: (carried, one row of each sequence, constants) ->
(carried, one row of each result). The program's size and compile time do not grow with the number
of iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from torchprime.torch_native.tpu.collectives import defined

Body = Callable[..., list[Tensor]]


@dataclass(frozen=True)
class Loop:
    """A traced body; the graph's operations name it by its number.

    Attributes:
        carried: the number of tensors that an iteration passes to the next one.
        sequences: the number of tensors of which it gets one row.
        rows: shape and type of each row that it returns.
        reverse: the last row comes first.
    """

    graph: GraphModule
    carried: int
    sequences: int
    rows: list[tuple[tuple[int, ...], torch.dtype]]
    reverse: bool = False
    number: int = field(default_factory=count().__next__)

    def __call__(
        self, init: Sequence[Tensor], sequences: Sequence[Tensor], constants: Sequence[Tensor] = ()
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Return what the last iteration carries, and the stacked results."""
        found = list(LOOP(self.number, list(init), list(sequences), list(constants)))
        return found[: self.carried], found[self.carried :]


# Loops by number, for the operations of graphs that name them.
LOOPS: dict[int, Loop] = {}


def traced_loop(
    body: Body,
    init: Sequence[Tensor],
    rows: Sequence[Tensor],
    constants: Sequence[Tensor] = (),
    reverse: bool = False,
) -> Loop:
    """Trace a loop's body on tensors without storage.

    Args:
        body: gets the tensors of all three lists, one after another.
        init: like the tensors that are carried.
        rows: like one row of each sequence.
        constants: like those that every iteration gets.
    """
    graph = traced(body, [*init, *rows, *constants])
    results = [each.meta["val"] for each in graph.graph.output_node().args[0]]  # pyright: ignore[reportGeneralTypeIssues,reportOptionalIterable,reportAttributeAccessIssue]
    shapes = [(tuple(each.shape), each.dtype) for each in results[len(init) :]]
    loop = Loop(graph, len(init), len(rows), shapes, reverse)
    LOOPS[loop.number] = loop
    return loop


def traced(function: Body, inputs: Sequence[Tensor]) -> GraphModule:
    """Trace a function of fake tensors; its gradients become operations like any other."""
    # New ones, as an input that is given twice would become one input.
    return make_fx(function, tracing_mode="fake")(*(x.new_empty(x.shape) for x in inputs))


def _fake(number: int, init: list[Tensor], sequences: list[Tensor], constants: list[Tensor]) -> Any:
    length = sequences[0].shape[0]
    rows = LOOPS[number].rows
    stacked = [init[0].new_empty((length, *shape), dtype=dtype) for shape, dtype in rows]
    return [each.new_empty(each.shape) for each in init] + stacked


LOOP = defined(
    "loop", "int number, Tensor[] init, Tensor[] sequences, Tensor[] constants", "Tensor[]", _fake
)
