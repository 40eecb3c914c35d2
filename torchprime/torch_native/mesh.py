"""The mesh of processes, one device each, with the same axes as on a TPU.

torch.distributed knows one mesh: an axis' size is that within a slice times that across slices.
`data` is outermost and `tensor` innermost, so that the processes that communicate most are
neighbours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout

from torchprime.errors import ConfigError
from torchprime.torch_native.runtime import transport_timeout

NAMES = ("data", "fsdp", "tensor")


@dataclass(frozen=True)
class DataRank:
    """The place of this process among those that get different rows of a batch.

    Processes along the tensor axis get the same rows and have the same place.
    """

    index: int
    count: int


def data_rank(mesh: DeviceMesh) -> DataRank:
    """Return this process's place along data and fsdp together, data first."""
    data, fsdp = (mesh[axis].size() for axis in ("data", "fsdp"))
    place = mesh.get_local_rank("data") * fsdp + mesh.get_local_rank("fsdp")
    return DataRank(place, data * fsdp)


def make_mesh(ici: Mapping[str, int], dcn: Mapping[str, int], device_type: str) -> DeviceMesh:
    """Return the mesh over all processes.

    Raises:
        ConfigError: the axes' product is not the number of processes.
    """
    sizes = [ici.get(name, 1) * dcn.get(name, 1) for name in NAMES]
    product, processes = sizes[0] * sizes[1] * sizes[2], dist.get_world_size()
    if product != processes:
        shown = " x ".join(f"{name}={size}" for name, size in zip(NAMES, sizes, strict=True))
        raise ConfigError(
            f"ici_mesh x dcn_mesh: given {shown} = {product} devices, but there are {processes} "
            f"processes. Start torchrun --standalone --nproc_per_node={product} (on several hosts "
            f"--nnodes times --nproc_per_node is {product}), or set ici_mesh.fsdp={processes}."
        )
    mesh = init_device_mesh(device_type, tuple(sizes), mesh_dim_names=NAMES)
    for name in NAMES:
        # The groups along the axes do not inherit the whole group's timeout.
        _set_pg_timeout(transport_timeout(), mesh.get_group(name))
    return mesh
