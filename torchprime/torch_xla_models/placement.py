"""From Hugging Face names to tensors on the mesh and back.

The model is built without storage. Its parameters are then made one at a time: read, cast, cut to
shards, host copy dropped. A scanned stack keeps one tensor [layers, ...] per layer parameter, read
layer by layer into one host buffer; its peak is that one tensor, not the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch_xla.distributed.spmd as xs
from torch import Tensor, nn
from torch_xla import _XLAC as XLAC  # pyright: ignore[reportPrivateImportUsage]

from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable, Spec
from torchprime.torch_xla_models.mesh import axis_sizes, to_device
from torchprime.torch_xla_models.remat import STACKED


class Placed(NamedTuple):
    """A parameter of the placed model: which checkpoint tensors it holds, and how it is cut."""

    hf_names: tuple[str, ...]  # one, or one per layer when stacked
    stacked: bool
    spec: Spec


def placements(model: CausalLM, table: ShardingTable, mesh: xs.Mesh) -> dict[str, Placed]:
    """Resolve every parameter of the (possibly scanned) model against the sharding table.

    Raises:
        ConfigError: from the table: unmatched, indivisible or large unsharded parameters.
    """
    marker = f"layers.{STACKED}."
    layers = range(model.architecture.num_hidden_layers)
    held: dict[str, tuple[str, ...]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        stacked = marker in name
        held[name] = tuple(name.replace(marker, f"layers.{i}.") for i in layers if stacked or not i)
        shape = tuple(parameter.shape[stacked:])
        shapes.update(dict.fromkeys(held[name], shape))
    specs = table.parameter_specs(shapes, axis_sizes(mesh))
    placed = {}
    for name, names in held.items():
        stacked, spec = marker in name, specs[names[0]]
        placed[name] = Placed(names, stacked, ((), *spec) if stacked else spec)
    return placed


def load(
    model: CausalLM,
    placed: dict[str, Placed],
    tensor_of: Callable[[str], Tensor],
    dtype: torch.dtype,
    mesh: xs.Mesh,
) -> None:
    """Give every parameter its storage on the mesh, in dtype, and move the constants."""
    for name, entry in placed.items():
        host = _read(entry, tensor_of, dtype)
        _replace(model, name, nn.Parameter(to_device(host, mesh, entry.spec)))
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        moved = to_device(buffer, mesh, ((),) * buffer.dim())
        model.get_submodule(owner).register_buffer(leaf, moved, persistent=False)


def _read(entry: Placed, tensor_of: Callable[[str], Tensor], dtype: torch.dtype) -> Tensor:
    first = tensor_of(entry.hf_names[0])
    if not entry.stacked:
        return first.to(dtype)
    host = torch.empty((len(entry.hf_names), *first.shape), dtype=dtype)
    host[0] = first
    for index, name in enumerate(entry.hf_names[1:], start=1):
        host[index] = tensor_of(name)
    return host


def _replace(model: CausalLM, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, parameter)


def gather(
    model: CausalLM, placed: dict[str, Placed], process_count: int
) -> Iterator[tuple[str, Tensor]]:
    """Bring the weights to the host one parameter at a time, by checkpoint name."""
    for name, parameter in model.named_parameters():
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
    """The whole tensor on the host, from the shards of this process; no device ever holds it whole.

    Moving a sharded tensor with `.cpu()` makes every device gather all of it first.
    """
    shards = XLAC._get_local_shards([tensor])[0]
    places = XLAC._get_local_shard_replica_and_indices([tensor])[0]
    if not XLAC._get_xla_sharding_spec(tensor) or len(shards) == 1:
        return shards[0][0].to(tensor.dtype)
    host = torch.empty(tensor.shape, dtype=tensor.dtype)
    for (shard, _), (_, indices) in zip(shards, places, strict=True):
        host[tuple(indices) if isinstance(indices, list) else indices] = shard
    return host


def _layers_over_processes(tensor: Tensor, entry: Placed) -> Iterator[tuple[str, Tensor]]:
    """Layers of a stack that no process holds whole, gathered one at a time by one small program:
    the layer's number enters as data."""
    for index, hf_name in enumerate(entry.hf_names):
        chosen = torch.tensor([index]).to(tensor.device)
        yield hf_name, torch.index_select(tensor, 0, chosen)[0].cpu()
