"""The process that compiles one step of TorchTPU; it is separate because libtpu can end it.

    python -m torchprime.torch_native.compile.worker REQUEST.json FOLDER PID

The request holds a config and an architecture; the results go into FOLDER (compiling/apart.py). The
environment was set by process PID, which waits (command.py). The step is traced on tensors without
storage, by the code that trains, and lowered by TorchTPU on placeholders. No chip takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from torchprime.attention_kernels.choice import Runtime, choose_kernel
from torchprime.compiling.tracing import run_step, step_parts
from torchprime.compiling.worker import Job, Result, worker_main
from torchprime.config.schema import TrainConfig
from torchprime.config.topologies import topology
from torchprime.torch_native.chips.backend import ChipsBackend
from torchprime.torch_native.chips.client import Chips
from torchprime.torch_native.chips.make import check_config
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.program import make_program
from torchprime.torch_native.tpu.step import StepGraph
from torchprime.training.processes import OneProcess


class Recorder:
    """A client of one chip, without a chip: it keeps tensors as they are, which may be without
    storage, and programs instead of running them.

    Args:
        kind: of the chips.
        count: of all chips.
    """

    local: Sequence[int] = (0,)

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.steps: list[StepGraph] = []

    def send(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors."""
        return list(parts)

    def read(self, value: list[Tensor]) -> list[Tensor]:
        """Return the tensors."""
        return value

    def compile(self, step: StepGraph) -> Callable[[Sequence[Any]], list[Any]]:
        """Keep a program; its results are nothing."""
        self.steps.append(step)
        return lambda inputs: [None] * (1 + sum(each.donated for each in step.inputs))

    def synchronize(self) -> None:
        """Do nothing."""

    def memory_bytes(self) -> None:
        """Return None: there is no chip."""

    def start_profile(self, folder: str) -> None:
        """Do nothing."""

    def stop_profile(self) -> None:
        """Do nothing."""


def trace(config: TrainConfig, architecture: Mapping[str, Any]) -> StepGraph:
    """Return the config's training step of one chip, by the backend that trains.

    Raises:
        ConfigError: one program cannot compute it.
    """
    check_config(config, "tpu")
    mesh = config.mesh_shape()
    grid = Grid(mesh["data"], mesh["fsdp"], mesh["tensor"])
    assert config.compile_only is not None
    client = Recorder(topology(config.compile_only).chip.name, grid.count)
    runtime = Runtime("TorchTPU", "TPU", calls_jax=False)
    wanted, length = config.model.attention_kernel, config.dataset.block_size
    backend = ChipsBackend(
        Chips(client, OneProcess(), grid),
        remat=config.remat.selects,
        attention=choose_kernel(wanted, length, runtime),
        loss=("chunked", ""),
    )
    parts = step_parts(config, architecture)
    backend.check(parts.model, parts.table)
    run_step(backend, parts)
    (step,) = client.steps
    return step


def run(request: dict[str, Any], folder: Path) -> Result:
    """Trace, lower and compile the request; return the result."""
    job = Job(request, folder, ("torch", "torch-tpu", "jax", "libtpu"))
    step = trace(job.config, request["architecture"])
    job.lap("trace")
    program = make_program(step)
    job.result["state_bytes"] = program.state_bytes
    return job.finish(program.module_for("tpu"), spmd=False)


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:], run))
