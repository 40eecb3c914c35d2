"""The grid of chips and the part of each parameter that a chip holds.

One process runs on each chip, and all run the same program. The axes' order is that of the native
backend's mesh: `data` is outermost and `tensor` innermost. The sharding table gives each dim of a
parameter its axes; the first axis of a dim is its outermost.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from torch import Tensor

from torchprime.sharding import Spec

Axes = tuple[str, ...]
BATCH = ("data", "fsdp")  # the axes along which chips have different rows
TENSOR = "tensor"


@dataclass(frozen=True)
class Grid:
    """The number of chips along each axis.

    Attributes:
        order: the runtime's number of each chip, by its number here; the same if it is empty.
    """

    data: int = 1
    fsdp: int = 1
    tensor: int = 1
    order: tuple[int, ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        """The number of chips by axis, outermost first."""
        return {"data": self.data, "fsdp": self.fsdp, TENSOR: self.tensor}

    @property
    def axes(self) -> Axes:
        """The axes with more than one chip."""
        return self.several(tuple(self.sizes))

    @property
    def count(self) -> int:
        """The number of chips."""
        return self.data * self.fsdp * self.tensor

    def several(self, axes: Sequence[str]) -> Axes:
        """Return those of the axes that have more than one chip. An axis that this grid does not
        have has one."""
        return tuple(axis for axis in axes if self.sizes.get(axis, 1) > 1)

    def size(self, axes: Sequence[str]) -> int:
        """Return the number of chips along several axes together."""
        return math.prod(self.sizes.get(axis, 1) for axis in axes)

    def rank(self, place: dict[str, int]) -> int:
        """Return the number of the chip at a place."""
        number = 0
        for axis, size in self.sizes.items():
            number = number * size + place[axis]
        return number

    def place(self, rank: int) -> dict[str, int]:
        """Return a chip's number along each axis."""
        found = {}
        for axis, size in reversed(self.sizes.items()):
            rank, found[axis] = divmod(rank, size)
        return found

    def groups(self, axes: Axes) -> list[list[int]]:
        """Return the groups of chips that differ along the axes only, by the runtime's numbers.

        In a group the first axis is the slowest, as in a dim that these axes cut.
        """
        rest = [axis for axis in self.sizes if axis not in axes]

        def ranks(fixed: tuple[int, ...]) -> list[int]:
            moving = product(*(range(self.sizes[axis]) for axis in axes))
            named = dict(zip(rest, fixed, strict=True))
            chips = [self.rank({**named, **dict(zip(axes, at, strict=True))}) for at in moving]
            return [self.order[chip] for chip in chips] if self.order else chips

        return [ranks(fixed) for fixed in product(*(range(self.sizes[axis]) for axis in rest))]


@dataclass(frozen=True)
class Cut:
    """The axes that cut each dim of a tensor; axes of one chip are left out."""

    grid: Grid
    dims: tuple[Axes, ...]

    @staticmethod
    def of(grid: Grid, spec: Spec) -> Cut:
        """Return the cut by a spec of the sharding table."""
        return Cut(grid, tuple(grid.several(axes) for axes in spec))

    @property
    def axes(self) -> Axes:
        """The axes that cut any dim."""
        return tuple(axis for dim in self.dims for axis in dim)

    @property
    def copies(self) -> int:
        """The number of chips that hold the same part."""
        return self.grid.count // self.grid.size(self.axes)

    def stacked(self) -> Cut:
        """Return the cut of a stack of layers, with an uncut dim in front."""
        return Cut(self.grid, ((), *self.dims))

    def part_of(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of a chip's part."""
        pairs = zip(shape, self.dims, strict=True)
        return tuple(size // self.grid.size(axes) for size, axes in pairs)

    def region(self, shape: Sequence[int], rank: int) -> tuple[slice, ...]:
        """Return the part of a chip in the whole tensor."""
        place, found = self.grid.place(rank), []
        for size, axes in zip(self.part_of(shape), self.dims, strict=True):
            number = 0
            for axis in axes:
                number = number * self.grid.sizes[axis] + place[axis]
            found.append(slice(number * size, (number + 1) * size))
        return tuple(found)

    def own(self, whole: Tensor, rank: int) -> Tensor:
        """Return a view of a chip's part of a whole tensor."""
        return whole[self.region(whole.shape, rank)]
