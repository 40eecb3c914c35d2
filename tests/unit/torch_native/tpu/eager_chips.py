"""Chips that run a step's graph together, operation by operation, with eager torch on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import jax
import numpy as np
import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter
from torch.utils import _pytree as pytree

from torchprime.attention_kernels.modules import kernel_function
from torchprime.torch_native.tpu import collectives
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.kernels import KERNEL, KERNELS, Kernel
from torchprime.torch_native.tpu.loops import LOOP, LOOPS


class Each:
    """A value of each chip."""

    def __init__(self, values: list[Any]) -> None:
        self.values = values

    def __getitem__(self, index: Any) -> Each:
        return Each([value[index] for value in self.values])


def total(xs: list[Tensor]) -> Tensor:
    return torch.stack(xs).sum(dim=0)


@cache
def interpreted(kernel: Kernel) -> Callable[..., Any]:
    return jax.jit(kernel_function(kernel.kind, replace(kernel.options, interpret=True)))


def in_interpreter(name: str, given: list[Tensor]) -> list[Tensor]:
    found = interpreted(KERNELS[name])(*(x.numpy() for x in given))
    return [torch.from_numpy(np.array(x)) for x in found]


class Chips(Interpreter):
    """Runs a graph whose inputs and results are values of each chip."""

    def __init__(self, graph: GraphModule, grid: Grid) -> None:
        super().__init__(graph, garbage_collect_values=True)
        self.grid = grid
        self.calls: list[str] = []

    def on_each(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Each:
        leaves, tree = pytree.tree_flatten((args, kwargs))

        def of(rank: int) -> Any:
            own = [x.values[rank] if isinstance(x, Each) else x for x in leaves]
            a, k = pytree.tree_unflatten(own, tree)
            return function(*a, **k)

        return Each([of(rank) for rank in range(self.grid.count)])

    def over(self, axes: str, x: Each, function: Callable[[list[Tensor]], list[Tensor]]) -> Each:
        found: list[Any] = [None] * self.grid.count
        for group in self.grid.groups(collectives.named(axes)):
            for rank, value in zip(group, function([x.values[r] for r in group]), strict=True):
                found[rank] = value
        return Each(found)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is LOOP:
            return self.loop(*args)
        if target is collectives.BARRIER:
            return [self.on_each(torch.Tensor.contiguous, (each,), {}) for each in args[0]]
        if target is KERNEL:
            return self.on_each(in_interpreter, args, kwargs)
        if target not in (
            collectives.ALL_GATHER,
            collectives.REDUCE_SCATTER,
            collectives.ALL_REDUCE,
        ):
            if isinstance(args[0] if args else None, list) and target.__name__ == "getitem":
                return target(*args)
            return self.on_each(target, args, kwargs)
        self.calls.append(target._schema.name.partition("::")[2])
        if target is collectives.ALL_REDUCE:
            return self.over(args[1], args[0], lambda xs: [total(xs)] * len(xs))
        x, dim, size, axes = args
        if target is collectives.ALL_GATHER:
            return self.over(axes, x, lambda xs: [torch.cat(xs, dim)] * len(xs))
        return self.over(axes, x, lambda xs: list(total(xs).chunk(size, dim)))

    def loop(self, number: int, init: list, sequences: list, constants: list) -> list:
        loop = LOOPS[number]
        length = sequences[0].values[0].shape[0]
        order = range(length - 1, -1, -1) if loop.reverse else range(length)
        carried, rows = list(init), {}
        for index in order:
            body = Chips(loop.graph, self.grid)
            found = body.run(*carried, *(s[index] for s in sequences), *constants)
            self.calls += body.calls
            carried, rows[index] = found[: loop.carried], found[loop.carried :]
        stacked = [
            self.on_each(lambda *xs: torch.stack(xs), [rows[i][n] for i in range(length)], {})
            for n in range(len(loop.rows))
        ]
        return [*carried, *stacked]
