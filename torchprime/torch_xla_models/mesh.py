"""The device mesh, and the sharding that a spec of the sharding table means on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor
from torch_xla import _XLAC as XLAC  # pyright: ignore[reportPrivateImportUsage]

from torchprime.errors import ConfigError
from torchprime.sharding import Spec


def make_mesh(ici: Mapping[str, int], dcn: Mapping[str, int]) -> xs.Mesh:
    """Build the mesh of ici x dcn sizes per axis and make it the global one.

    The axes keep the order of the mappings, the ones with most communication last, so that tensor
    neighbours are neighbours on the interconnect.

    Raises:
        ConfigError: the product is not the number of existing devices.
    """
    names = tuple(ici)
    ici_sizes = tuple(ici[name] for name in names)
    dcn_sizes = tuple(dcn[name] for name in names)
    sizes = tuple(a * b for a, b in zip(ici_sizes, dcn_sizes, strict=True))
    devices = xr.global_runtime_device_count()
    if int(np.prod(sizes)) != devices:
        equation = " x ".join(f"{name}={size}" for name, size in zip(names, sizes, strict=True))
        raise ConfigError(
            f"ici_mesh x dcn_mesh: {equation} = {int(np.prod(sizes))} devices, but there are "
            f"{devices}. Make the product {devices}"
            + (", or unset CPU_NUM_DEVICES." if xr.device_type() == "CPU" else ".")
        )
    order = device_order(ici_sizes, dcn_sizes, _slice_numbers(devices, dcn))
    mesh = xs.Mesh(order, sizes, names)
    xs.set_global_mesh(mesh)
    return mesh


def device_order(
    ici_sizes: Sequence[int], dcn_sizes: Sequence[int], slice_of: Sequence[int]
) -> npt.NDArray[np.int64]:
    """Return the device numbers in the order of the mesh, flat.

    Numbers count chips along a row of the slice, then rows, so that neighbours along the last axes
    are neighbours on the interconnect. torch_xla's HybridMesh would go through a slice column by
    column, 0, 2, 1, 3 on four chips. A Pallas kernel knows nothing of that order: jax numbers the
    devices of a mesh from 0 to n as they stand there. Each layer's q, k, v and output would then
    travel to other chips before and after the kernel, forward and backward.

    Args:
        slice_of: the slice of each device.
    """
    count = len(ici_sizes)
    ids = np.argsort(slice_of, kind="stable").reshape(*dcn_sizes, *ici_sizes)
    # Of each axis, first the slice, then the position in it.
    return ids.transpose([dim for axis in range(count) for dim in (axis, count + axis)]).flatten()


def _slice_numbers(devices: int, dcn: Mapping[str, int]) -> list[int]:
    """Return the slice of each device; there are as many slices as in the mesh."""
    if xr.device_type() != "TPU":
        return [0] * devices  # virtual devices have no interconnect, and no slices
    found = [int(each.get("slice_index", 0)) for each in _device_attributes()]
    slices = len(set(found))
    if slices != int(np.prod(list(dcn.values()))):
        noun = "slice" if slices == 1 else "slices"
        raise ConfigError(
            f"dcn_mesh: {dict(dcn)} does not fit this TPU of {slices} {noun}. Its axes multiply to "
            "the number of slices; all are 1 on a single slice."
        )
    return found


def device_places() -> list[list[int]]:
    """Return the coordinates of each TPU chip in its slice, by number; none on other devices."""
    if xr.device_type() != "TPU":
        return []
    return [list(each.get("coords", [])) for each in _device_attributes()]


def _device_attributes() -> list[dict[str, Any]]:
    """Return the runtime's attributes of each device, by number."""
    return xr.global_runtime_device_attributes()  # pyright: ignore[reportReturnType]


def axis_sizes(mesh: xs.Mesh) -> dict[str, int]:
    """Return the number of devices along each axis, by name."""
    return dict(zip(mesh.axis_names or (), mesh.mesh_shape, strict=True))


def partition(spec: Spec) -> tuple[tuple[str, ...] | str | None, ...]:
    """Return a table's spec in torch_xla's form."""
    return tuple(None if not dim else dim[0] if len(dim) == 1 else dim for dim in spec)


def to_device(tensor: Tensor, mesh: xs.Mesh, spec: Spec) -> Tensor:
    """Send a CPU tensor to its shards; the device never holds it whole unless the spec says so."""
    moved = tensor.to(torch_xla.device())
    annotate(moved, mesh, partition(spec))
    return moved


def annotate(tensor: Tensor, mesh: xs.Mesh, spec: tuple) -> None:
    """Annotate a tensor with its sharding in place; one that holds data is resharded.

    torch_xla's `mark_sharding` tries to import torchax each time it is called: if that fails, it
    costs half of a millisecond for each of a step's hundreds of annotations.

    Args:
        spec: in torch_xla's form.
    """
    assert tensor.dim() == len(spec), f"{tuple(tensor.shape)} cut as {spec}"
    XLAC._xla_mark_sharding(tensor, mesh.get_op_sharding(spec))


def send_batch(tensors: Sequence[Tensor], mesh: xs.Mesh, spec: Spec) -> list[Tensor]:
    """Start sending equal-rank CPU tensors to their shards without waiting.

    Every process passes the whole global batch; the runtime takes the shards of its own devices. A
    batch is a few hundred kilobytes, so this is simpler than splitting it by host, and always
    correct.
    """
    spec_of = xs.ShardingSpec(mesh, partition(spec))
    device = str(torch_xla.device())
    return XLAC._xla_tensors_from_aten(
        list(tensors), [device] * len(tensors), [spec_of.xla_spec(t) for t in tensors]
    )


def execute(outputs: Sequence[Tensor]) -> None:
    """Execute the traced program of these tensors, without waiting for it.

    `torch_xla.sync()` executes the pending operations of every live tensor of the process, so that
    one that is alive in another thread, or in a traceback, changes the program and causes a
    recompile.
    """
    XLAC._xla_sync_multi(list(outputs), devices=[], wait=False, sync_xla_data=True)


def constrain(tensor: Tensor, mesh: xs.Mesh, spec: Spec) -> Tensor:
    """Annotate an activation, and its gradient, with a sharding."""
    return _Constrain.apply(tensor, mesh, partition(spec))  # type: ignore[no-any-return]


def local(tensor: Tensor, mesh: xs.Mesh, spec: Spec) -> Tensor:
    """Return a device's own part of a tensor, of the part's shape. What is computed from it is not
    partitioned: each device runs it on its own, until `whole_of`."""
    copy = tensor * 1  # one that holds data would be annotated in place
    annotate(copy, mesh, partition(spec))
    return XLAC._spmd_full_to_shard_shape(copy)


def whole_of(part: Tensor, shape: torch.Size, mesh: xs.Mesh, spec: Spec) -> Tensor:
    """Return the tensor of a shape whose parts are the devices' results from `local` tensors."""
    copy = part * 1
    XLAC._mark_manual_sharding(copy, _MANUAL)
    return XLAC._spmd_shard_to_full_shape(
        copy, mesh.get_op_sharding(partition(spec)), list(shape), copy.dtype
    )


_MANUAL = XLAC.OpSharding([], [], [], xs.ShardingType.MANUAL)


class _Constrain(torch.autograd.Function):
    """Autograd function for a sharding. Annotating works in place, and would reshard a tensor that
    holds data: it annotates a copy, which the compiler removes."""

    @staticmethod
    def forward(ctx, tensor: Tensor, mesh: xs.Mesh, spec: tuple) -> Tensor:  # type: ignore[override]
        ctx.mesh, ctx.spec = mesh, spec
        copy = tensor.clone()
        annotate(copy, mesh, spec)
        return copy

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        copy = grad.clone()
        annotate(copy, ctx.mesh, ctx.spec)
        return copy, None, None
