"""XLA's CPU client in the place of TPU chips: the same module, run on virtual devices of the host.

The number of virtual devices is fixed when jax starts (`environment.on_cpu`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import ml_dtypes
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib import xla_client
from torch import Tensor

from torchprime.compiling.executables import parse
from torchprime.errors import RuntimeSetupError
from torchprime.torch_native.chips.client import Run, Value
from torchprime.torch_native.tpu.program import make_program
from torchprime.torch_native.tpu.step import StepGraph

# Types that numpy does not have: the same bits in a type that it has, and jax's own name of them.
BITS: dict[torch.dtype, tuple[torch.dtype, Any]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.int8, ml_dtypes.float8_e4m3fn),
}


class CpuClient:
    """The first `count` virtual devices, in the place of chips.

    Raises:
        RuntimeSetupError: jax started with fewer devices.
    """

    kind = "CPU"

    def __init__(self, count: int) -> None:
        found = jax.devices("cpu")
        if len(found) < count:
            raise RuntimeSetupError(
                f"XLA_FLAGS: given {len(found)} virtual devices, expected "
                f"--xla_force_host_platform_device_count={count}, one for each place of the mesh. "
                "Unset XLA_FLAGS to let torchprime set it."
            )
        self.count = count
        self.local: Sequence[int] = range(count)
        self.devices = found[:count]
        self.mesh = Mesh(np.array(self.devices), ("chip",))
        self.last: list[Value] = []

    def send(self, parts: Sequence[Tensor]) -> Value:
        """Copy host tensors, one to each device."""
        pairs = zip(parts, self.devices, strict=True)
        return self._joined([jax.device_put(_to_numpy(part), device) for part, device in pairs])

    def read(self, value: Value) -> list[Tensor]:
        """Wait for a value; return copies of its parts."""
        by_device = {shard.device: shard.data for shard in value.addressable_shards}
        return [_from_numpy(np.array(by_device[device])) for device in self.devices]

    def compile(self, step: StepGraph) -> Run:
        """Lower a graph by TorchTPU as for chips, and compile the module for the CPU. Attention
        kernels are computed by jax's interpreter."""
        return self.compile_module(parse(make_program(step).module_for("cpu")))

    def compile_module(self, module: Any) -> Run:
        """Compile a module for all devices."""
        options = xla_client.CompileOptions()
        options.num_replicas, options.num_partitions = self.count, 1
        numbers = np.array([[device.id] for device in self.devices])
        options.device_assignment = xla_client.DeviceAssignment.create(numbers)
        executable = self.devices[0].client.compile_and_load(
            module,
            executable_devices=xla_client.DeviceList(tuple(self.devices)),
            compile_options=options,
        )
        return partial(self._run, executable)

    def _run(self, executable: Any, inputs: Sequence[Value]) -> list[Value]:
        results = executable.execute_sharded(list(inputs)).disassemble_into_single_device_arrays()
        self.last = [self._joined(result) for result in results]
        return self.last

    def _joined(self, parts: Sequence[Any]) -> Value:
        shape = parts[0].shape
        spec = PartitionSpec("chip") if shape else PartitionSpec()
        whole = (shape[0] * len(parts), *shape[1:]) if shape else shape
        sharding = NamedSharding(self.mesh, spec)
        return jax.make_array_from_single_device_arrays(whole, sharding, list(parts))

    def synchronize(self) -> None:
        """Wait for the results of the last program; programs run in order."""
        jax.block_until_ready(self.last[:1])

    def memory_bytes(self) -> int | None:
        """Return None: a CPU's memory is the host's."""
        return None

    def start_profile(self, folder: str) -> None:
        """Start jax's profiler."""
        jax.profiler.start_trace(folder)

    def stop_profile(self) -> None:
        """Stop jax's profiler, which writes the trace."""
        jax.profiler.stop_trace()


def _to_numpy(tensor: Tensor) -> Any:
    """Return a copy of a tensor. jax may take over the memory that it is given."""
    copy = tensor.detach().clone(memory_format=torch.contiguous_format)
    if copy.dtype not in BITS:
        return copy.numpy()
    bits, name = BITS[copy.dtype]
    return copy.view(bits).numpy().view(name)


def _from_numpy(array: Any) -> Tensor:
    for dtype, (bits, name) in BITS.items():
        if array.dtype == name:
            numpy_name = str(bits).removeprefix("torch.")
            return torch.from_numpy(array.view(numpy_name)).view(dtype)
    return torch.from_numpy(array)
