"""A program through the TPU's compiler, for chips that this host does not have."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torchprime.torch_native.tpu.program import Program


class Compiled(NamedTuple):
    """The compiler's result for one chip.

    Attributes:
        memory: bytes by kind: argument, output, alias, temp, generated_code.
        hlo: the optimized program.
    """

    memory: dict[str, int]
    hlo: str


def tpu_devices(topology: str) -> list[Any]:
    """Return the devices of a slice such as `v6e:2x4`, which this host does not have, in the order
    of their numbers."""
    # late: the compiler's library is only where TorchTPU is
    import libtpu  # pyright: ignore[reportMissingImports]
    from jax.experimental import topologies

    os.environ["TPU_LIBRARY_PATH"] = libtpu.get_library_path()
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    return sorted(found, key=lambda device: device.id)


def compile_for(program: Program, topology: str) -> Compiled:
    """Compile a program for a slice such as `v6e:2x4`; nothing is run."""
    # late: as above
    import jax.interpreters.mlir as jax_mlir
    from jaxlib import xla_client
    from jaxlib.mlir import ir

    devices = tpu_devices(topology)[: program.step.grid.count]
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = len(devices), 1
    numbers = np.array([[device.id] for device in devices])
    options.device_assignment = xla_client.DeviceAssignment.create(numbers)
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(program.text)
        executable = devices[0].client.compile(
            module,
            executable_devices=xla_client.DeviceList(tuple(devices)),
            compile_options=options,
        )
    stats = executable.get_compiled_memory_stats()
    kinds = ("argument", "output", "alias", "temp", "generated_code")
    memory = {kind: getattr(stats, f"{kind}_size_in_bytes") for kind in kinds}
    return Compiled(memory, executable.hlo_modules()[0].to_string())
