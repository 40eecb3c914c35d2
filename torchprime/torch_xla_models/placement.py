"""Mapping between Hugging Face names and tensors on the mesh.

The model is built without storage. Its parameters are then made one at a time: read, cast, split
into shards, host copy freed. A scanned stack has one tensor [layers, ...] per layer parameter, read
layer by layer into one host buffer; peak host memory is that one tensor, not the model. The
optimizer's state and a penalty's anchors are placed like their weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch_xla import _XLAC as XLAC  # pyright: ignore[reportPrivateImportUsage]

from torchprime.adapters.apply import saved
from torchprime.adapters.quantized import placed_type
from torchprime.checkpoint.run.shards import TensorShards
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable, Spec, shard_count
from torchprime.torch_xla_models.device_tensors import DeviceTensors
from torchprime.torch_xla_models.layers.scan import names_in_stack
from torchprime.torch_xla_models.linear import original_shape, turned, turned_spec
from torchprime.torch_xla_models.mesh import axis_sizes, constrain
from torchprime.training.backend import ResumedState
from torchprime.training.optim.ema import EMA
from torchprime.training.optim.optimizer import Optimizer, Parameter, Slot
from torchprime.training.regularization.penalty import Anchor, AnchorSource
from torchprime.training.step import ParameterState


class Placed(NamedTuple):
    """A parameter of the placed model: the checkpoint tensors that it holds, and its sharding."""

    hf_names: tuple[str, ...]  # one, or one per layer when stacked
    stacked: bool
    spec: Spec


def placements(model: CausalLM, table: ShardingTable, mesh: xs.Mesh) -> dict[str, Placed]:
    """Resolve every parameter of the (possibly scanned) model against the sharding table.

    Raises:
        ConfigError: from the table: unmatched, indivisible or large unsharded parameters.
    """
    held: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    stacked: set[str] = set()
    for name, parameter in model.named_parameters():
        found = names_in_stack(name, len(parameter)) if parameter.dim() else None
        stacked.update([name] if found else [])
        held[name] = found or (name,)
        shape = original_shape(name, parameter.shape[bool(found) :])
        shapes.update(dict.fromkeys(held[name], shape))
    specs = table.parameter_specs(shapes, axis_sizes(mesh))
    placed = {}
    for name, names in held.items():
        spec = turned_spec(name, specs[names[0]])
        whole = ((), *spec) if name in stacked else spec
        placed[name] = Placed(names, name in stacked, whole)
    return placed


def load(
    model: CausalLM,
    placed: dict[str, Placed],
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype,
    tensors: DeviceTensors,
) -> None:
    """Give every parameter its storage on the mesh, and move the constants.

    Args:
        dtype: of the weights; parts of quantized ones keep their own.
    """

    values = sent(model, placed, tensor_of, dtype, tensors)
    for name, moved in values:
        old = model.get_parameter(name)
        _replace(model, name, nn.Parameter(moved, requires_grad=old.requires_grad))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        moved = tensors.send(buffer, ((),) * buffer.dim())
        model.get_submodule(owner).register_buffer(leaf, moved, persistent=False)


def slot_spec(slot: Slot, shape: tuple[int, ...], spec: Spec, mesh: xs.Mesh) -> Spec:
    """Return the sharding of a state slot: that of its parameter, with a last dim whole that has
    fewer values than its axes have shards, or no multiple of them."""
    kept = [spec[dim] for dim in slot.dims]
    if slot.per > 1 and slot.kept(shape)[-1] % shard_count((kept[-1],), axis_sizes(mesh)):
        kept[-1] = ()
    return tuple(kept)


def sent(
    model: CausalLM,
    placed: dict[str, Placed],
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype,
    tensors: DeviceTensors,
) -> Iterator[tuple[str, Tensor]]:
    """Yield a tensor on the mesh for each parameter of a model, with the values of `tensor_of`."""

    def in_order(name: str) -> Tensor:
        return turned(name, tensor_of(name))

    for name, entry in placed.items():
        host = host_tensor(entry, in_order, placed_type(name, model.get_parameter(name), dtype))
        yield name, tensors.send(host, entry.spec)


def host_tensor(entry: Placed, tensor_of: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    """Return the tensor of an entry, whole on the host; without storage if its parts have none."""
    first = tensor_of(entry.hf_names[0])
    if not entry.stacked:
        return first.to(dtype)
    host = first.new_empty((len(entry.hf_names), *first.shape), dtype=dtype)
    host[0] = first
    for index, name in enumerate(entry.hf_names[1:], start=1):
        host[index] = tensor_of(name)
    return host


def _replace(model: CausalLM, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def averages(
    parameters: Mapping[str, ParameterState], placed: Mapping[str, Placed], tensors: DeviceTensors
) -> dict[str, Tensor]:
    """Return the moving averages of weights, in the weights' type, by the parameters' names."""
    found = {name: p.slots[EMA] for name, p in parameters.items() if EMA in p.slots}
    copies = {
        name: constrain(average.to(weight.dtype), tensors.mesh, placed[name].spec)
        for name, average in found.items()
        if (weight := parameters[name].weight).dtype != average.dtype
    }
    if copies:
        tensors.run(list(copies.values()))
    return found | copies


@contextmanager
def instead(model: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Let a model read other tensors as its parameters of these names inside."""
    split = [(*name.rpartition(".")[::2], tensor) for name, tensor in tensors.items()]
    places = [(model.get_submodule(owner), leaf, tensor) for owner, leaf, tensor in split]
    own = [module._parameters[leaf] for module, leaf, _ in places]
    try:
        for module, leaf, tensor in places:
            module._parameters[leaf] = tensor  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for (module, leaf, _), parameter in zip(places, own, strict=True):
            module._parameters[leaf] = parameter


@dataclass(frozen=True)
class StateMaker:
    """Maker of the state of trained parameters on the mesh.

    Attributes:
        master_weights: true adds fp32 copies of weights of other types.
        resumed: a checkpoint to read the state from; None makes zeros.
        anchors: the values of a penalty's frozen tensors; None for a run without one.
        base: the base's weights by parameter, if the mesh has them already.
    """

    tensors: DeviceTensors
    optimizer: Optimizer
    master_weights: bool
    resumed: ResumedState | None
    anchors: AnchorSource | None
    base: Mapping[str, Tensor] | None

    def make(self, name: str, weight: Tensor, entry: Placed) -> ParameterState:
        """Return the state of one parameter."""
        info = Parameter(entry.hf_names, tuple(weight.shape), weight.dtype, entry.stacked)
        has_master = weight.dtype != torch.float32 and self.master_weights
        if self.resumed is None:
            slots, master = self._new(info, weight, entry, has_master)
        else:
            slots, master = self._stored(self.resumed, info, entry, has_master)
        return ParameterState(info, weight, slots, master, self._anchor(name, weight, entry))

    def _new(
        self, info: Parameter, weight: Tensor, entry: Placed, has_master: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        slots = {}
        for slot, keeps in self.optimizer.slots(info).items():
            spec = slot_spec(keeps, info.shape, entry.spec, self.tensors.mesh)
            slots[slot] = self.tensors.zeros(keeps.kept(info.shape), spec, keeps.dtype)
        return slots, self.tensors.widened(weight, entry.spec) if has_master else None

    def _stored(
        self, resumed: ResumedState, info: Parameter, entry: Placed, has_master: bool
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        def sent(prefix: str, keeps: Slot) -> Tensor:
            host = host_tensor(
                entry, lambda name: resumed.tensor_of(f"{prefix}.{name}"), keeps.dtype
            )
            spec = slot_spec(keeps, info.shape, entry.spec, self.tensors.mesh)
            return self.tensors.send(host, spec)

        slots = {
            slot: sent(f"optimizer.{slot}", keeps)
            for slot, keeps in self.optimizer.slots(info).items()
        }
        return slots, sent("master", Slot(info.dims)) if has_master else None

    def _anchor(self, name: str, weight: Tensor, entry: Placed) -> Anchor | None:
        if self.anchors is None:
            return None
        fisher = self.anchors.fisher

        def sent(tensor_of: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
            return self.tensors.send(host_tensor(entry, tensor_of, dtype), entry.spec)

        base = self.base[name] if self.base else sent(self.anchors.base, weight.dtype)
        return Anchor(base, None if fisher is None else sent(fisher, torch.float32))


def gather(
    model: CausalLM, placed: dict[str, Placed], process_count: int
) -> Iterator[tuple[str, Tensor]]:
    """Yield the saved weights on the host one parameter at a time, by checkpoint name."""
    for name, parameter in saved(model).items():
        entry = placed[name]
        if process_count == 1:
            host = from_local_shards(parameter.detach())
        elif entry.stacked:
            yield from _layers_over_processes(parameter.detach(), entry)
            continue
        else:
            host = parameter.detach().cpu()
        if not entry.stacked:
            yield entry.hf_names[0], host
            continue
        for index, hf_name in enumerate(entry.hf_names):
            yield hf_name, host[index]


def from_local_shards(tensor: Tensor) -> Tensor:
    """Return the whole tensor on the host, from the shards of this process.

    No device ever holds it whole: moving a sharded tensor with `.cpu()` makes every device gather
    all of it first.
    """
    shards = XLAC._get_local_shards([tensor])[0]
    places = XLAC._get_local_shard_replica_and_indices([tensor])[0]
    if not XLAC._get_xla_sharding_spec(tensor) or len(shards) == 1:
        return shards[0][0].to(tensor.dtype)
    host = torch.empty(tensor.shape, dtype=tensor.dtype)
    for (shard, _), (_, indices) in zip(shards, places, strict=True):
        host[tuple(indices) if isinstance(indices, list) else indices] = shard
    return host


def checkpoint_shards(tensor: Tensor, names: Sequence[str], stacked: bool) -> list[TensorShards]:
    """Return a tensor on the mesh in a checkpoint's form: an entry for each of its names, which are
    its layers if it is a stack. Copies of a shard are written once."""
    places = XLAC._get_local_shard_replica_and_indices([tensor])[0]
    first = int(stacked)
    shape = tuple(tensor.shape)
    kept: list[int] = []
    chunks: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    for number, (replica, indices) in enumerate(places):
        slices = indices if isinstance(indices, list) else [slice(0, size) for size in shape]
        offsets = tuple(cut.start for cut in slices)
        sizes = tuple(cut.stop - cut.start for cut in slices)
        if replica == 0 and 0 not in sizes:  # padding makes empty shards
            kept.append(number)
            chunks.append((offsets[first:], sizes[first:]))
    host = _HostShards(tensor, kept, [sizes for _, sizes in chunks], uses=len(names), skip=first)
    return [
        TensorShards(name, shape[first:], tensor.dtype, chunks, partial(host.layer, index))
        if stacked
        else TensorShards(name, shape, tensor.dtype, chunks, host.whole)
        for index, name in enumerate(names)
    ]


class _HostShards:
    """The shards of a tensor on the host, fetched at the first use and freed after the last."""

    def __init__(
        self, tensor: Tensor, kept: list[int], sizes: list[tuple[int, ...]], uses: int, skip: int
    ) -> None:
        self._tensor, self._kept, self._sizes, self._left = tensor, kept, sizes, uses
        self._skip = skip
        self._shards: list[Tensor] = []

    def whole(self) -> list[Tensor]:
        """Return each shard, without padding."""
        if not self._shards:
            found = XLAC._get_local_shards([self._tensor])[0]
            for number, sizes in zip(self._kept, self._sizes, strict=True):
                cut = (slice(None),) * self._skip + tuple(slice(0, size) for size in sizes)
                self._shards.append(found[number][0].to(self._tensor.dtype)[cut])
        shards, self._left = self._shards, self._left - 1
        if not self._left:
            self._shards = []
        return shards

    def layer(self, index: int) -> list[Tensor]:
        """Return the shards of one layer of a stack."""
        return [shard[index] for shard in self.whole()]


def _layers_over_processes(tensor: Tensor, entry: Placed) -> Iterator[tuple[str, Tensor]]:
    """Yield the layers of a stack that no process holds whole, gathered one at a time by one small
    program: the layer's number enters as data."""
    for index, hf_name in enumerate(entry.hf_names):
        chosen = torch.tensor([index]).to(tensor.device)
        yield hf_name, torch.index_select(tensor, 0, chosen)[0].cpu()
