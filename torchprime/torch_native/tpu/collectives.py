"""Collectives as operations of the step's graph, and their gradients.

The step is traced once, on tensors without storage. Its collectives stay operations of their own in
the graph, which name the axes and not the chips; `torchtpu.py` gives each the runtime's collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from torchprime.torch_native.tpu.grid import BATCH, TENSOR, Axes, Cut, Grid

LIBRARY = "torchprime_step"
library = torch.library.Library(LIBRARY, "DEF")


def _traced_only(*_: Any) -> Any:
    raise AssertionError("collectives of the step are traced, not run")


def defined(name: str, inputs: str, outputs: str, fake: Any) -> Any:
    """Define an operation that is traced and has no implementation here."""
    library.define(f"{name}({inputs}) -> {outputs}")
    library.impl(name, _traced_only, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{LIBRARY}::{name}", fake)
    return getattr(getattr(torch.ops, LIBRARY), name).default


def _gathered(x: Tensor, dim: int, size: int, axes: str) -> Tensor:
    return x.new_empty([n * size if at == dim else n for at, n in enumerate(x.shape)])


def _scattered(x: Tensor, dim: int, size: int, axes: str) -> Tensor:
    return x.new_empty([n // size if at == dim else n for at, n in enumerate(x.shape)])


ALL_GATHER = defined("all_gather", "Tensor x, int dim, int size, str axes", "Tensor", _gathered)
REDUCE_SCATTER = defined(
    "reduce_scatter", "Tensor x, int dim, int size, str axes", "Tensor", _scattered
)
ALL_REDUCE = defined(
    "all_reduce", "Tensor x, str axes", "Tensor", lambda x, axes: x.new_empty(x.shape)
)
BARRIER = defined(
    "barrier", "Tensor[] xs", "Tensor[]", lambda xs: [x.new_empty(x.shape) for x in xs]
)


def joined(axes: Axes) -> str:
    """Return the axes as an argument of an operation."""
    return ",".join(axes)


def named(axes: str) -> Axes:
    """Return the axes of such an argument."""
    return tuple(axes.split(","))


def all_gather(grid: Grid, x: Tensor, dim: int, axes: Axes) -> Tensor:
    """Return the parts of all chips along the axes, joined along a dim."""
    return ALL_GATHER(x, dim, grid.size(axes), joined(axes)) if axes else x


def reduce_scatter(grid: Grid, x: Tensor, dim: int, axes: Axes) -> Tensor:
    """Return this chip's part of the sum over the chips along the axes."""
    return REDUCE_SCATTER(x, dim, grid.size(axes), joined(axes)) if axes else x


def all_reduce(x: Tensor, axes: Axes) -> Tensor:
    """Return the sum over the chips along the axes."""
    return ALL_REDUCE(x, joined(axes)) if axes else x


def barrier(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the tensors; what uses them is computed after all of them and not merged with earlier
    work on the same values."""
    return list(BARRIER(list(tensors)))


@dataclass(frozen=True)
class Gather:
    """The way from a chip's part of a parameter to the tensor that it multiplies by, and back.

    Attributes:
        dims: the axes gathered along each dim, outermost first. An axis that cuts the parameter and
            is not here stays cut.
        partial: each chip along `tensor` has only its share of the gradient, so they are summed.
    """

    grid: Grid
    dims: tuple[Axes, ...]
    partial: bool = False

    @staticmethod
    def of(cut: Cut, keep: Axes = (), partial: bool = False) -> Gather:
        """Return the gather of a cut along all axes but those that stay."""
        dims = tuple(tuple(axis for axis in axes if axis not in keep) for axes in cut.dims)
        return Gather(cut.grid, dims, partial)

    @property
    def summed(self) -> Axes:
        """The axes along which a gradient is summed and stays whole."""
        done = {axis for axes in self.dims for axis in axes}
        over = (*BATCH, *([TENSOR] if self.partial else []))
        return self.grid.several([axis for axis in over if axis not in done])

    def __call__(self, part: Tensor) -> Tensor:
        """Return the gathered tensor; its gradient is summed over the chips with different rows."""
        return _Gathered.apply(part, self)  # pyright: ignore[reportReturnType]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, gather: Gather) -> Tensor:
        ctx.gather = gather
        for dim, axes in enumerate(gather.dims):
            part = all_gather(gather.grid, part, dim, axes)
        return part.view_as(part)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        gather: Gather = ctx.gather
        for dim, axes in reversed(list(enumerate(gather.dims))):
            grad = reduce_scatter(gather.grid, grad, dim, axes)
            # Otherwise the chips along it computed the same gradient.
            if TENSOR in axes and not gather.partial:
                grad = grad / gather.grid.tensor
        return all_reduce(grad, gather.summed), None


class _Copied(torch.autograd.Function):
    """The input of layers that are cut along their outputs: the same on all chips along `tensor`,
    and each of them has a share of its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return all_reduce(grad, (TENSOR,))


class _Summed(torch.autograd.Function):
    """The output of layers that are cut along their inputs: the sum over the chips."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return all_reduce(x, (TENSOR,))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad


def copied(x: Tensor) -> Tensor:
    """Return the input; its gradient is summed along `tensor`."""
    return _Copied.apply(x)  # pyright: ignore[reportReturnType]


def summed(x: Tensor) -> Tensor:
    """Return the sum along `tensor`; its gradient is passed on."""
    return _Summed.apply(x)  # pyright: ignore[reportReturnType]
