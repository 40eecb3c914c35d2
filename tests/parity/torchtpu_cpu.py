"""XLA's CPU client as eight chips: compiles a program for several devices and runs it.

`XLA_FLAGS=--xla_force_host_platform_device_count=8` has to be set before jax starts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client
from torch import Tensor


class CpuChips:
    """A program on the first `count` devices."""

    def __init__(self, module: Any, count: int) -> None:
        self.devices = jax.devices("cpu")[:count]
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = count, 1
        numbers = np.array([[device.id] for device in self.devices])
        options.device_assignment = xla_client.DeviceAssignment.create(numbers)
        self.program = self.devices[0].client.compile_and_load(
            module, executable_devices=xla_client.DeviceList(tuple(self.devices)),
            compile_options=options,
        )  # fmt: skip
        self.mesh = Mesh(np.array(self.devices), ("chip",))

    def run(self, inputs: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Return the results of each chip, from the inputs of each chip."""
        given = [self._sent(each) for each in zip(*inputs, strict=True)]
        results = self.program.execute_sharded(given).disassemble_into_single_device_arrays()
        return [[_host(r[chip]) for r in results] for chip in range(len(self.devices))]

    def _sent(self, parts: Sequence[Tensor]) -> Any:
        arrays = [
            jax.device_put(part.numpy(), d) for part, d in zip(parts, self.devices, strict=True)
        ]
        shape = arrays[0].shape
        spec = PartitionSpec("chip") if shape else PartitionSpec()
        whole = (shape[0] * len(arrays), *shape[1:]) if shape else shape
        return jax.make_array_from_single_device_arrays(
            whole, NamedSharding(self.mesh, spec), arrays
        )


def _host(array: Any) -> Tensor:
    return torch.from_numpy(np.array(array))
