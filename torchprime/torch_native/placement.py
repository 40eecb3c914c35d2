"""Mapping between Hugging Face names and sharded parameters (FSDP2, DTensor).

The model is sharded without storage: layer by layer along the tensor axis if the sharding table
says so, then along fsdp. After that only each parameter's shard is read: of mapped files a
process reads only its own pages, and no parameter is ever whole on a device.

The table's `tensor` entries of linear layers decide how they are sharded: along `out` (column
wise) or along `in` (row wise). If the tensor axis does not divide the kv heads, the projections
to them stay whole along it, and every process selects the heads that its queries use. A fused
projection's output is gathered, and every process selects its heads or columns of it.

The embedding and the output projection stay whole along tensor, since the loss multiplies by the
whole vocabulary; along fsdp FSDP2 shards dim 0 of every parameter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    RowwiseParallel,
    parallelize_module,
)

from torchprime.adapters.lora import AdaptedLinear
from torchprime.adapters.quantized import AS_FLOAT, QuantizedLinear, placed_type
from torchprime.errors import ConfigError
from torchprime.models.architecture import Architecture
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable
from torchprime.torch_native.runtime import waiting
from torchprime.training.optim.optimizer import Convert, Mean, mean_over, unchanged

TENSOR = "tensor"
KV_PROJECTIONS = ("self_attn.k_proj", "self_attn.v_proj")


def tensor_styles(
    layer: nn.Module, architecture: Architecture, table: ShardingTable, size: int
) -> dict[str, ParallelStyle]:
    """Return the parallel styles of a decoder layer's linear layers along the tensor axis.

    Raises:
        ConfigError: heads or a table that this axis cannot divide.
    """
    if architecture.num_attention_heads % size:
        raise ConfigError(
            f"ici_mesh.tensor={size} does not divide the model's "
            f"{architecture.num_attention_heads} attention heads (num_attention_heads). Use a size "
            "that does."
        )
    if architecture.qk_norm_over_heads and architecture.num_key_value_heads % size:
        raise ConfigError(
            f"ici_mesh.tensor: given {size}, expected a divisor of the "
            f"{architecture.num_key_value_heads} kv heads (num_key_value_heads), since this model "
            "normalizes keys over all heads. Use such a size, or the fsdp axis instead."
        )
    whole = KV_PROJECTIONS if architecture.num_key_value_heads % size else ()
    styles: dict[str, ParallelStyle] = {}
    for name, module in layer.named_modules():
        if not isinstance(module, nn.Linear) or name.startswith(whole):
            continue
        spec = table.find(table.parameters, f"model.layers.0.{name}.weight") or ((), ())
        cut = [dim for dim, axes in enumerate(spec) if TENSOR in axes]
        if not cut:
            continue
        if module.weight.shape[cut[0]] % size:
            raise ConfigError(
                f"ici_mesh.tensor={size} does not divide dim {cut[0]} of {name} "
                f"{list(module.weight.shape)}. Use a size that does."
            )
        styles[name] = ColwiseParallel() if cut[0] == 0 else RowwiseParallel()
    return styles


def check_adapter(model: CausalLM, size: int) -> None:
    """Check that the tensor axis can shard the adapters and the form of the base's weights.

    Raises:
        ConfigError: it can't shard DoRA, whose norms are of whole rows, nor quantized weights.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            key, given = "adapter.base_dtype", "a quantized base"
        elif isinstance(module, AdaptedLinear) and module.dora:
            key, given = "adapter.dora", "true"
        else:
            continue
        raise ConfigError(
            f"{key}: given {given} with ici_mesh.tensor={size}, expected ici_mesh.tensor=1: the "
            "native backend does not shard it along the tensor axis. Use the fsdp axis instead."
        )


class Source(NamedTuple):
    """A model without storage, and the values of its parameters by name."""

    model: CausalLM
    tensor_of: Callable[[str], Tensor]


def load(
    root: nn.Module,
    sources: Sequence[Source],
    table: ShardingTable,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    device: torch.device,
) -> None:
    """Give every parameter its storage and shard it.

    Args:
        root: the module that the step calls; it has the models of all sources.
    """
    # Shards are gathered and used in the parameters' dtype; gradients are summed in fp32.
    options: dict[str, Any] = {
        "mesh": mesh["data", "fsdp"],
        "mp_policy": MixedPrecisionPolicy(reduce_dtype=torch.float32),
        # FSDP2 shards dim 0; a number has none, and every process holds it.
        "ignored_params": {
            p for source in sources for p in source.model.parameters() if not p.dim()
        },
    }
    for model, _ in sources:
        for name, parameter in model.named_parameters():  # no storage yet
            parameter.data = parameter.data.to(placed_type(name, parameter, dtype))
            if parameter.dim() and not parameter.dtype.is_floating_point:
                parameter.data = parameter.data.view(AS_FLOAT)
        _shard_layers(model, table, mesh, options)
    fully_shard(root, **options)
    for source in sources:
        _fill(source.model, source.tensor_of, device)
    root.to(device)  # no conversion, but FSDP2 then uses the new shards


def _shard_layers(
    model: CausalLM, table: ShardingTable, mesh: DeviceMesh, options: Mapping[str, Any]
) -> None:
    layers = model.model.layers
    assert isinstance(layers, nn.ModuleList)
    for layer in layers:
        if mesh[TENSOR].size() > 1:
            styles = tensor_styles(layer, model.architecture, table, mesh[TENSOR].size())
            _shard_along_tensor(layer, mesh[TENSOR], styles)
            _share_fused(layer, model.architecture, mesh[TENSOR])
            if model.architecture.qk_norm_over_heads:
                _share_norms(layer, mesh[TENSOR])
            fused = model.architecture.fused_qkv
            if model.architecture.num_key_value_heads % mesh[TENSOR].size() and not fused:
                _share_kv_heads(layer, model.architecture, mesh[TENSOR])
        fully_shard(layer, **options)


def _shard_along_tensor(
    layer: nn.Module, mesh: DeviceMesh, styles: dict[str, ParallelStyle]
) -> None:
    """Shard a layer by its styles; frozen weights stay frozen, and each process drops the inputs
    that the whole layer would drop."""
    frozen = [name for name, p in layer.named_parameters() if not p.requires_grad]
    parallelize_module(layer, mesh, styles, src_data_rank=None)
    for name in frozen:  # torch replaces sharded parameters by ones that require a gradient
        layer.get_parameter(name).requires_grad_(False)
    for name, module in layer.named_modules():
        if isinstance(module, AdaptedLinear):
            part = module.lora_A.in_features // mesh.size()
            shared_out = isinstance(styles.get(f"{name}.lora_A"), RowwiseParallel)
            module.lora_dropout.first = mesh.get_local_rank() * part if shared_out else 0


def _share_kv_heads(layer: nn.Module, a: Architecture, mesh: DeviceMesh) -> None:
    """Make whole projections to kv heads return only the heads that this process's queries use."""
    mine = own_kv_heads(a, mesh.size(), mesh.get_local_rank())

    def take(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        # All processes compute the same here, and each adds its part of the gradient.
        whole = DTensor.from_local(output, mesh, [Replicate()], run_check=False)
        heads = whole.to_local(grad_placements=[Partial()]).unflatten(-1, (-1, a.head_dim))
        return torch.stack([heads[..., number, :] for number in mine], dim=-2).flatten(-2)

    for name in KV_PROJECTIONS:
        layer.get_submodule(name).register_forward_hook(take)


def _share_fused(layer: nn.Module, a: Architecture, mesh: DeviceMesh) -> None:
    """Make fused projections return only this process's queries, keys and values, or its columns of
    gate and up."""
    size, rank = mesh.size(), mesh.get_local_rank()
    if a.fused_qkv:
        queries, h = a.num_attention_heads // size, a.head_dim
        keys = [a.num_attention_heads + head for head in own_kv_heads(a, size, rank)]
        values = [a.num_key_value_heads + key for key in keys]
        heads = [*range(rank * queries, (rank + 1) * queries), *keys, *values]
        slices = [slice(head * h, (head + 1) * h) for head in heads]
        attention: Any = layer.get_submodule("self_attn")
        attention.parts = [h * queries, h * len(keys), h * len(values)]
        attention.qkv_proj.register_forward_hook(_own_columns(mesh, slices))
    if a.fused_mlp:
        ffn, part = a.intermediate_size, a.intermediate_size // size
        starts = (rank * part, ffn + rank * part)
        slices = [slice(start, start + part) for start in starts]
        layer.get_submodule("mlp.gate_up_proj").register_forward_hook(_own_columns(mesh, slices))


def _share_norms(layer: nn.Module, mesh: DeviceMesh) -> None:
    """Normalize the queries and keys of all heads on every process, which goes on with its own."""

    def gather(module: nn.Module, args: tuple[Tensor]) -> Tensor:
        sharded = DTensor.from_local(args[0], mesh, [Shard(args[0].dim() - 1)], run_check=False)
        # Each process adds its part of the gradient.
        whole = sharded.redistribute(placements=[Replicate()])
        return whole.to_local(grad_placements=[Partial()])

    def take(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.chunk(mesh.size(), dim=-1)[mesh.get_local_rank()]

    for name in ("q_norm", "k_norm"):
        norm = layer.get_submodule(f"self_attn.{name}")
        norm.register_forward_pre_hook(gather)
        norm.register_forward_hook(take)


def _own_columns(mesh: DeviceMesh, slices: Sequence[slice]) -> Callable[..., Tensor]:
    """Return a hook that gathers an output along the tensor axis and takes some columns of it."""

    def take(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        sharded = DTensor.from_local(output, mesh, [Shard(output.dim() - 1)], run_check=False)
        whole = sharded.redistribute(placements=[Replicate()])
        # Each process adds its part of the gradient.
        columns = whole.to_local(grad_placements=[Partial()])
        return torch.cat([columns[..., part] for part in slices], dim=-1)

    return take


def own_kv_heads(a: Architecture, size: int, rank: int) -> list[int]:
    """List the kv heads for the queries of one process of `size`.

    Each is listed once if equally many queries use it; otherwise once for each query.
    """
    queries = a.num_attention_heads // size
    group = a.num_attention_heads // a.num_key_value_heads
    needed = [query // group for query in range(rank * queries, (rank + 1) * queries)]
    distinct = sorted(set(needed))
    even = len({needed.count(number) for number in distinct}) == 1
    return distinct if even else needed


def _fill(model: CausalLM, tensor_of: Callable[[str], Tensor], device: torch.device) -> None:
    """Load each parameter's shard, and move constants.

    If nothing has to be converted (one process on a CPU, the files' own type) the shard is the
    mapped file: private to this process, copied page by page as updates write to it.
    """
    for name, parameter in list(model.named_parameters()):
        value = own_part(tensor_of(name), parameter)
        value = value.view(AS_FLOAT) if parameter.dtype == AS_FLOAT else value.to(parameter.dtype)
        value = value.to(device).contiguous()
        if isinstance(parameter, DTensor):
            value = DTensor.from_local(
                value,
                parameter.device_mesh,
                parameter.placements,
                run_check=False,
                shape=parameter.shape,
                stride=parameter.stride(),
            )
        owner, _, leaf = name.rpartition(".")
        placed = nn.Parameter(value, requires_grad=parameter.requires_grad)
        setattr(model.get_submodule(owner), leaf, placed)
    for name, buffer in list(model.named_buffers()):
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner).register_buffer(leaf, buffer.to(device), persistent=False)


def gather(parameters: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield whole weights on the host, one at a time; every process takes part in each."""
    for name, parameter in parameters:
        value = parameter.detach()
        with waiting(f"gathering {name}"):
            whole = (value.full_tensor() if isinstance(value, DTensor) else value).cpu()
        yield name, whole


def local(parameter: Tensor) -> Tensor:
    """Return this process's shard, sharing storage."""
    value = parameter.detach()
    return value.to_local() if isinstance(value, DTensor) else value


def mean_of(parameter: Tensor) -> Mean:
    """Return the mean over dims of the whole parameter, by processes that hold shards of it.

    A sharded dim is summed locally and then along each mesh axis that shards it. Shards may be
    uneven or empty: the sum is divided by the size of the whole.
    """
    if not isinstance(parameter, DTensor):
        return mean_over
    shape, mesh = parameter.shape, parameter.device_mesh
    cutting: dict[int, list[dist.ProcessGroup]] = {}
    for axis, placed in enumerate(parameter.placements):
        dim = getattr(placed, "dim", None)  # of shards, plain and strided; replicas have none
        if dim is not None and mesh.size(axis) > 1:
            cutting.setdefault(dim, []).append(mesh.get_group(axis))

    def mean(values: Tensor, dims: tuple[int, ...]) -> Tensor:
        dims = tuple(dim % len(shape) for dim in dims)
        total = values.sum(dim=dims, keepdim=True)
        for group in (group for dim in dims for group in cutting.get(dim, ())):
            dist.all_reduce(total, group=group)
        return total / math.prod(shape[dim] for dim in dims)

    return mean


def whole_of(parameter: Tensor) -> Convert:
    """Return the function that gathers values sharded like a parameter, by an all-gather along each
    mesh axis that shards it."""
    if not isinstance(parameter, DTensor):
        return unchanged
    shape, stride = parameter.shape, parameter.stride()
    mesh, placements = parameter.device_mesh, parameter.placements

    def whole(values: Tensor) -> Tensor:
        sharded = DTensor.from_local(
            values, mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return sharded.full_tensor()

    return whole


def own_of(parameter: Tensor) -> Convert:
    """Return the function that takes this process's shard of values of the whole parameter."""
    cut = tuple(slice(at, at + size) for at, size in zip(*region(parameter), strict=True))
    return lambda values: values[cut]


def copies(parameter: Tensor, mesh: DeviceMesh) -> int:
    """Return the number of processes that hold the same shard of a parameter."""
    pieces = mesh["fsdp"].size()
    if isinstance(parameter, DTensor) and TENSOR in (parameter.device_mesh.mesh_dim_names or ()):
        pieces *= mesh[TENSOR].size()
    return mesh.size() // pieces


def region(parameter: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (offsets, sizes) of this process's shard in the whole parameter."""
    if not isinstance(parameter, DTensor):
        return (0,) * parameter.dim(), tuple(parameter.shape)
    sizes, offsets = compute_local_shape_and_global_offset(
        parameter.shape, parameter.device_mesh, parameter.placements
    )
    return tuple(offsets), tuple(sizes)


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return a view of this process's shard in a tensor of the shape of a whole parameter."""
    pairs = zip(*region(parameter), strict=True)
    return whole[tuple(slice(at, at + size) for at, size in pairs)]


def writes(parameter: Tensor, mesh: DeviceMesh) -> bool:
    """Return True if this process writes its shard, among all that hold the same one."""
    cut: set[str] = set()
    if isinstance(parameter, DTensor):
        names = parameter.device_mesh.mesh_dim_names or ()
        placed = zip(names, parameter.placements, strict=True)
        cut = {name for name, placement in placed if not placement.is_replicate()}
    names = mesh.mesh_dim_names or ()
    return all(name in cut or mesh.get_local_rank(name) == 0 for name in names)
