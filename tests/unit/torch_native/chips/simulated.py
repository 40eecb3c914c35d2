"""A client whose chips are simulated by eager torch, operation by operation, in this process."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from eager_chips import Chips as Interpreter
from eager_chips import Each
from torch import Tensor

from torchprime.torch_native.chips.backend import ChipsBackend
from torchprime.torch_native.chips.client import Chips
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.step import StepGraph
from torchprime.training.processes import OneProcess


class SimulatedClient:
    kind = "CPU"

    def __init__(self, count: int) -> None:
        self.count = count
        self.local: Sequence[int] = range(count)

    def send(self, parts: Sequence[Tensor]) -> Each:
        return Each([part.clone() for part in parts])

    def read(self, value: Each) -> list[Tensor]:
        return [part.clone() for part in value.values]

    def compile(self, step: StepGraph) -> Callable[[Sequence[Each]], list[Each]]:
        return lambda inputs: Interpreter(step.graph, step.grid).run(*inputs)

    def synchronize(self) -> None: ...

    def memory_bytes(self) -> int | None:
        return None

    def start_profile(self, folder: str) -> None: ...

    def stop_profile(self) -> None: ...


def simulated_backend(grid: Grid, remat: bool = True) -> ChipsBackend:
    chips = Chips(SimulatedClient(grid.count), OneProcess(), grid)
    return ChipsBackend(chips, remat=remat, attention=("reference", ""), loss=("chunked", ""))
