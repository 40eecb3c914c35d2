"""The optimizer's state for one process's shards: new, from a checkpoint, into a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchprime.checkpoint.run.shards import TensorShards
from torchprime.torch_native import placement
from torchprime.training.backend import ResumedState, StepOptions
from torchprime.training.optim import Optimizer, Parameter, decays
from torchprime.training.step import ParameterState


@dataclass(frozen=True)
class StateMaker:
    """Maker of the state of trained parameters, in fp32 on the device.

    Attributes:
        resumed: a checkpoint, of which only the regions of this process's shards are read; None
            makes zeros.
    """

    optimizer: Optimizer
    options: StepOptions
    device: torch.device
    resumed: ResumedState | None

    def make(self, name: str, parameter: Tensor) -> ParameterState:
        """Return the state of one parameter, which may be sharded."""
        shard, mean = placement.local(parameter), placement.mean_of(parameter)
        info = Parameter(tuple(shard.shape), shard.dtype, decays(name), False, mean)
        slots = self.optimizer.slots(info)
        has_master = shard.dtype != torch.float32 and self.options.master_weights
        if self.resumed is None:
            zeros = {
                slot: torch.zeros([shard.shape[d] for d in keeps.dims], device=self.device)
                for slot, keeps in slots.items()
            }
            return ParameterState(info, shard, zeros, shard.float() if has_master else None)
        own = partial(self._own, self.resumed, placement.region(parameter))
        stored = {
            slot: own(f"optimizer.{slot}.{name}", keeps.dims) for slot, keeps in slots.items()
        }
        every = range(parameter.dim())
        master = own(f"master.{name}", every) if has_master else None
        return ParameterState(info, shard, stored, master)

    def _own(
        self,
        resumed: ResumedState,
        place: tuple[tuple[int, ...], tuple[int, ...]],
        full_name: str,
        dims: Sequence[int],
    ) -> Tensor:
        """Return this process's shard of a state that keeps these dims of its parameter."""
        offsets, sizes = place
        region = [offsets[d] for d in dims], [sizes[d] for d in dims]
        if 0 in region[1]:  # more processes than rows: this process holds none of it
            return torch.zeros(region[1], device=self.device)
        part = resumed.tensor_of(full_name, region)
        return part.to(device=self.device, dtype=torch.float32, copy=True)


def state_shards(
    name: str, parameter: Tensor, state: ParameterState, optimizer: Optimizer, mesh: DeviceMesh
) -> list[TensorShards]:
    """Return a parameter and its state by their names in a checkpoint.

    Of the processes that hold the same shard, one lists its region.
    """
    offsets, sizes = placement.region(parameter)
    here = placement.writes(parameter, mesh) and 0 not in sizes
    kept = optimizer.slots(state.info)
    every = tuple(range(parameter.dim()))
    tensors = {f"model.{name}": (state.weight, every)}
    tensors |= {
        f"optimizer.{slot}.{name}": (tensor, kept[slot].dims)
        for slot, tensor in state.slots.items()
    }
    tensors |= {} if state.master is None else {f"master.{name}": (state.master, every)}
    found = []
    for full, (tensor, dims) in tensors.items():
        chunk = tuple(offsets[d] for d in dims), tuple(sizes[d] for d in dims)
        shape = tuple(parameter.shape[d] for d in dims)
        chunks, read = ([chunk], partial(list, [tensor])) if here else ([], list)
        found.append(TensorShards(full, shape, tensor.dtype, chunks, read, live=True))
    return found
