"""TorchTPU's runtime: the chip of this process. No TPU has run this module.

The program is the text that XLA's CPU client runs in tests. TorchTPU compiles it for all chips and
runs it on tensors of the device `tpu`. Donated inputs lose their memory to results.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from torchprime.torch_native.chips.client import Run, Value
from torchprime.torch_native.tpu.program import make_program, to_text
from torchprime.torch_native.tpu.step import StepGraph
from torchprime.torch_native.tpu.torchtpu import DEVICE, executable


class TpuClient:
    """One chip of a grid.

    Args:
        number: of the chip in the grid.
        count: of all chips.
    """

    def __init__(self, number: int, count: int) -> None:
        self.count = count
        self.local: Sequence[int] = [number]
        self.device = torch.device(DEVICE)
        self.kind = str(getattr(torch, DEVICE).get_device_name())
        self._profile: profile | None = None

    def send(self, parts: Sequence[Tensor]) -> Value:
        """Copy a host tensor to the chip."""
        (part,) = parts
        # The copy may be queued: it must not see later changes of the host's tensor.
        return part.detach().clone(memory_format=torch.contiguous_format).to(self.device)

    def read(self, value: Value) -> list[Tensor]:
        """Wait for a value; return a copy on the host."""
        return [value.cpu()]

    def compile(self, step: StepGraph) -> Run:
        """Lower a graph, and compile it for all chips."""
        return executable(to_text(make_program(step).module_for("tpu")))

    def synchronize(self) -> None:
        """Wait until the chip has finished all its work."""
        torch.accelerator.synchronize()

    def memory_bytes(self) -> int | None:
        """Return the peak bytes of tensors on the chip."""
        peak = getattr(torch.accelerator, "max_memory_allocated", None)
        return None if peak is None else int(peak())

    def start_profile(self, folder: str) -> None:
        """Start torch's profiler, for the host and the chip."""
        handler = torch.profiler.tensorboard_trace_handler(folder)
        activities = [ProfilerActivity.CPU, ProfilerActivity.PrivateUse1]
        self._profile = profile(activities=activities, on_trace_ready=handler)
        self._profile.start()

    def stop_profile(self) -> None:
        """Stop the profiler, which writes the trace."""
        assert self._profile is not None
        self._profile.stop()
        self._profile = None
