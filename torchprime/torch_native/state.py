"""The optimizer's state for one process's shards: new, from a checkpoint, into a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchprime.checkpoint.run.shards import TensorShards
from torchprime.torch_native import placement
from torchprime.training.backend import ResumedState, StepOptions
from torchprime.training.optim.ema import EMA
from torchprime.training.optim.optimizer import Optimizer, Parameter, Slot
from torchprime.training.regularization.penalty import Anchor, AnchorSource
from torchprime.training.step import ParameterState


@dataclass(frozen=True)
class StateMaker:
    """Maker of the state of trained parameters, in fp32 on the device.

    Attributes:
        resumed: a checkpoint, of which only the regions of this process's shards are read; None
            makes zeros.
        anchors: the values of a penalty's frozen tensors; None for a run without one.
        base: the base's weights by name, sharded alike, if the processes have them already.
    """

    optimizer: Optimizer
    options: StepOptions
    device: torch.device
    resumed: ResumedState | None
    anchors: AnchorSource | None = None
    base: Mapping[str, Tensor] | None = None

    def make(self, name: str, parameter: Tensor) -> ParameterState:
        """Return the state of one parameter, which may be sharded."""
        shard = placement.local(parameter)
        info = Parameter((name,), tuple(parameter.shape), shard.dtype)._replace(
            mean=placement.mean_of(parameter),
            whole=placement.whole_of(parameter),
            own=placement.own_of(parameter),
        )
        slots = self.optimizer.slots(info)
        has_master = shard.dtype != torch.float32 and self.options.master_weights
        if self.resumed is None:
            zeros = {
                slot: torch.zeros(keeps.kept(shard.shape), dtype=keeps.dtype, device=self.device)
                for slot, keeps in slots.items()
            }
            master = shard.float() if has_master else None
            return ParameterState(info, shard, zeros, master, self._anchor(name, parameter))
        own = partial(self._own, self.resumed, placement.region(parameter))
        stored = {slot: own(f"optimizer.{slot}.{name}", keeps) for slot, keeps in slots.items()}
        master = own(f"master.{name}", Slot(info.dims)) if has_master else None
        return ParameterState(info, shard, stored, master, self._anchor(name, parameter))

    def _anchor(self, name: str, parameter: Tensor) -> Anchor | None:
        """Return this process's shards of a parameter's anchor, in memory of their own."""
        if self.anchors is None:
            return None

        def own(tensor_of: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
            part = placement.own_part(tensor_of(name), parameter)
            return part.to(device=self.device, dtype=dtype, copy=True)

        fisher = self.anchors.fisher
        if self.base is None:
            base = own(self.anchors.base, parameter.dtype)
        else:
            base = placement.local(self.base[name])
        return Anchor(base, None if fisher is None else own(fisher, torch.float32))

    def _own(
        self,
        resumed: ResumedState,
        place: tuple[tuple[int, ...], tuple[int, ...]],
        full_name: str,
        keeps: Slot,
    ) -> Tensor:
        """Return this process's shard of a state."""
        offsets, sizes = (keeps.kept(numbers) for numbers in place)
        if 0 in sizes:  # more processes than rows: this process holds none of it
            return torch.zeros(sizes, dtype=keeps.dtype, device=self.device)
        part = resumed.tensor_of(full_name, (list(offsets), list(sizes)))
        return part.to(device=self.device, dtype=keeps.dtype, copy=True)


@contextmanager
def averaged(parameters: Iterable[ParameterState]) -> Iterator[None]:
    """Put the moving averages in the place of the weights inside; nothing without averages."""
    pairs = [(p.weight, p.slots[EMA]) for p in parameters if EMA in p.slots]
    kept = [weight.clone() for weight, _ in pairs]
    for weight, average in pairs:
        weight.copy_(average)
    try:
        yield
    finally:
        for (weight, _), value in zip(pairs, kept, strict=True):
            weight.copy_(value)


def state_shards(
    name: str,
    parameter: Tensor,
    state: ParameterState | None,
    optimizer: Optimizer,
    mesh: DeviceMesh,
) -> list[TensorShards]:
    """Return a parameter and its state, if it is trained, by their names in a checkpoint.

    Of the processes that hold the same shard, one lists its region.
    """
    offsets, sizes = placement.region(parameter)
    here = placement.writes(parameter, mesh) and 0 not in sizes
    every = Slot(tuple(range(parameter.dim())))
    tensors = {f"model.{name}": (placement.local(parameter), every)}
    if state is not None:
        kept = optimizer.slots(state.info)
        tensors |= {
            f"optimizer.{slot}.{name}": (tensor, kept[slot]) for slot, tensor in state.slots.items()
        }
        tensors |= {} if state.master is None else {f"master.{name}": (state.master, every)}
    found = []
    for full, (tensor, keeps) in tensors.items():
        chunk = keeps.kept(offsets), keeps.kept(sizes)
        shape = keeps.kept(parameter.shape)
        chunks, read = ([chunk], partial(list, [tensor])) if here else ([], list)
        found.append(TensorShards(full, shape, tensor.dtype, chunks, read, live=True))
    return found


def whole_shards(name: str, tensor: Tensor, *, here: bool) -> TensorShards:
    """Return a tensor that all processes hold whole; one of them lists it."""
    shape = tuple(tensor.shape)
    chunks, read = ([((0,) * len(shape), shape)], partial(list, [tensor])) if here else ([], list)
    return TensorShards(name, shape, tensor.dtype, chunks, read, live=True)
