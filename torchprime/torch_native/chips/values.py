"""Weights and optimizer state on the chips: from a checkpoint, to the host, to a checkpoint.

A value on the chips has a part for each place of the grid. The parts of equal layers are stacked; a
checkpoint has each layer's tensors by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from torchprime.checkpoint.run.shards import TensorShards
from torchprime.torch_native.chips.client import Client, Value
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.parameters import Held
from torchprime.training.backend import ResumedState
from torchprime.training.optim.optimizer import Slot
from torchprime.training.processes import Processes

Region = tuple[tuple[int, ...], tuple[int, ...]]  # offsets, sizes


@dataclass(frozen=True)
class Kept:
    """A tensor on the chips, and the checkpoint's tensors that it has.

    Attributes:
        prefix: of the names in a checkpoint, such as `optimizer.m`.
        slot: the dims of the parameter that it has.
    """

    held: Held
    prefix: str
    slot: Slot
    dtype: torch.dtype

    @staticmethod
    def weight(held: Held) -> Kept:
        """Return a parameter's own."""
        return Kept.whole(held, "model", held.dtype)

    @staticmethod
    def whole(held: Held, prefix: str, dtype: torch.dtype) -> Kept:
        """Return a tensor with all dims of a parameter."""
        return Kept(held, prefix, Slot(tuple(range(len(held.shape)))), dtype)

    @property
    def name(self) -> str:
        """The name among a program's inputs."""
        return f"{self.prefix}.{self.held.name}"

    @property
    def names(self) -> list[str]:
        """The names in a checkpoint."""
        return [f"{self.prefix}.{name}" for name in self.held.names]

    @property
    def part(self) -> tuple[int, ...]:
        """The shape of a chip's part."""
        return self.slot.kept(self.held.part)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of a checkpoint's tensor."""
        return self.slot.kept(self.held.shape)[int(self.held.stacked) :]

    def region(self, rank: int) -> Region:
        """Return the place of a chip's part in a checkpoint's tensor."""
        cut = self.held.cut.region(self.held.shape, rank)
        first = int(self.held.stacked)
        offsets = self.slot.kept([each.start for each in cut])[first:]
        return offsets, self.part[first:]

    def stored(self, resumed: ResumedState, rank: int) -> Tensor:
        """Return a chip's part from a checkpoint, of which only this region is read."""
        offsets, sizes = self.region(rank)
        parts = [resumed.tensor_of(n, (list(offsets), list(sizes))) for n in self.names]
        whole = torch.stack(list(parts)) if self.held.stacked else parts[0]
        return whole.to(self.dtype)

    def owners(self, grid: Grid, ranks: Sequence[int]) -> list[int]:
        """Return those of the chips that have a part which no chip before them has."""
        others = [axis for axis in grid.axes if axis not in self.held.cut.axes]
        found: dict[Region, int] = {}
        for rank in ranks:
            place = grid.place(rank)
            if not any(place[axis] for axis in others):
                found.setdefault(self.region(rank), rank)
        return list(found.values())


def loaded(client: Client, held: Held, tensor_of: Callable[[str], Tensor]) -> Value:
    """Return a parameter's value on the chips."""
    return client.send([held.part_on(rank, tensor_of) for rank in client.local])


def same_on_all(client: Client, tensor: Tensor) -> Value:
    """Return a value that is the same on all chips."""
    return client.send([tensor] * len(client.local))


def whole_tensors(
    client: Client, processes: Processes, kept: Kept, value: Value
) -> Iterator[tuple[str, Tensor]]:
    """Yield the checkpoint's tensors of a value, whole on the host; all processes take part."""
    grid = kept.held.cut.grid
    owners = kept.owners(grid, client.local)
    parts = dict(zip(client.local, client.read(value), strict=True)) if owners else {}
    mine = [(kept.region(rank), parts[rank]) for rank in owners]
    every = [each for found in processes.gather(mine) for each in found]
    for index, name in enumerate(kept.held.names):
        whole = torch.empty(kept.shape, dtype=kept.dtype)
        for (offsets, sizes), part in every:
            pairs = zip(offsets, sizes, strict=True)
            place = tuple(slice(at, at + size) for at, size in pairs)
            whole[place] = part[index] if kept.held.stacked else part
        yield name, whole


def checkpoint_shards(client: Client, kept: Kept, value: Value) -> list[TensorShards]:
    """Return a value's tensors by their names in a checkpoint, with this process's regions."""
    owners = kept.owners(kept.held.cut.grid, client.local)
    parts = _HostParts(client, value, [client.local.index(rank) for rank in owners], kept)
    chunks = [kept.region(rank) for rank in owners]
    return [
        TensorShards(name, kept.shape, kept.dtype, chunks, partial(parts.take, index))
        for index, name in enumerate(kept.names)
    ]


class _HostParts:
    """The parts of a stack on the host: read for its first layer, and let go after its last."""

    def __init__(self, client: Client, value: Value, places: Sequence[int], kept: Kept) -> None:
        self.read = partial(client.read, value)
        self.places, self.stacked, self.left = places, kept.held.stacked, len(kept.names)
        self.parts: list[Tensor] | None = None

    def take(self, index: int) -> list[Tensor]:
        """Return this process's regions of one layer."""
        if self.parts is None:
            every = self.read() if self.places else []
            self.parts = [every[place] for place in self.places]
        found = [part[index] if self.stacked else part for part in self.parts]
        self.left -= 1
        if not self.left:
            self.parts = None
        return found
