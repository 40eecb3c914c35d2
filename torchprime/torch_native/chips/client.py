"""The runtime that holds tensors on chips and runs programs there: the seam below the backend.

One client drives the chips of this process: all of them where XLA's CPU client stands in for chips
(`cpu_client.py`), one on a TPU (`tpu_client.py`). A value is opaque: it has a part on each of these
chips.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.step import StepGraph
from torchprime.training.processes import Processes

Value = Any
# The program's inputs in order -> its results in order. The memory of donated inputs is gone then.
Run = Callable[[Sequence[Value]], list[Value]]


class Client(Protocol):
    """A runtime.

    Attributes:
        kind: of the chips, for people and for peak speeds.
        count: of the chips of all processes.
        local: the numbers of this process's chips, in the grid's order.
    """

    kind: str
    count: int
    local: Sequence[int]

    def send(self, parts: Sequence[Tensor]) -> Value:
        """Start to copy host tensors to the chips, one to each local chip; the tensors may be
        changed after the call."""
        ...

    def read(self, value: Value) -> list[Tensor]:
        """Wait for a value; return its part on each local chip, in host memory of its own."""
        ...

    def compile(self, step: StepGraph) -> Run:
        """Compile a graph for all chips."""
        ...

    def synchronize(self) -> None:
        """Wait until the local chips have finished all their work."""
        ...

    def memory_bytes(self) -> int | None:
        """Return the peak bytes in use on one chip, None if the runtime does not report them."""
        ...

    def start_profile(self, folder: str) -> None:
        """Start a trace, written to the folder."""
        ...

    def stop_profile(self) -> None:
        """Stop the trace."""
        ...


@dataclass(frozen=True)
class Chips:
    """The machine of a backend.

    Attributes:
        processes: that drive chips together, each by its client.
        grid: of all chips.
    """

    client: Client
    processes: Processes
    grid: Grid

    @property
    def row_groups(self) -> int:
        """The number of parts of a batch, which different chips get."""
        return self.grid.data * self.grid.fsdp

    def row_group(self, rank: int) -> int:
        """Return the part of a batch that a chip gets."""
        place = self.grid.place(rank)
        return place["data"] * self.grid.fsdp + place["fsdp"]
