"""The process that compiles one step of TorchTPU; it is separate because libtpu can end it.

    python -m torchprime.torch_native.compile.worker REQUEST.json FOLDER PID

The request holds a config and an architecture; the results go into FOLDER (compiling/apart.py). The
environment was set by process PID, which waits (command.py). The step is traced on tensors without
storage, by the code that trains, and lowered by TorchTPU on placeholders. No chip takes part.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torchprime.attention_kernels.choice import Runtime, choose_kernel
from torchprime.compiling.worker import Job, Result, step_parts, worker_main
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.model import SPLASH
from torchprime.data.blocks.batch import empty_batch
from torchprime.models.decoder import CausalLM, replace_attention_cores
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.kernels import KernelAttention
from torchprime.torch_native.tpu.parameters import hold
from torchprime.torch_native.tpu.program import Program, make_program
from torchprime.torch_native.tpu.step import Rows, StepBuilder, Training
from torchprime.training.backend import StepOptions
from torchprime.training.step import host_fields


def lower(config: TrainConfig, architecture: Mapping[str, Any]) -> Program:
    """Return the config's training step of one chip.

    Raises:
        ConfigError: one program cannot compute it.
    """
    model, table, dtype, optimizer, options = step_parts(config, architecture)
    inject_attention(model, config)
    mesh = config.mesh_shape()
    grid = Grid(mesh["data"], mesh["fsdp"], mesh["tensor"])
    parts = hold(model, table, grid, dtype, remat=config.remat.selects)
    builder = StepBuilder(parts, Training(optimizer, options))
    return make_program(builder.build(rows_of(config, grid, options)))


def inject_attention(model: CausalLM, config: TrainConfig) -> None:
    """Put the config's attention kernel into every layer."""
    runtime = Runtime("TorchTPU", "TPU", calls_jax=False)
    name, _ = choose_kernel(config.model.attention_kernel, config.dataset.block_size, runtime)
    if name == SPLASH:
        replace_attention_cores(model, KernelAttention)


def rows_of(config: TrainConfig, grid: Grid, options: StepOptions) -> Rows:
    """Return the shape and the types of a chip's rows."""
    batch = empty_batch((1, config.dataset.block_size), with_sources=options.num_sources > 1)
    micro = config.task.gradient_accumulation_steps
    rows = config.task.global_batch_size // micro // (grid.data * grid.fsdp)
    kinds = tuple(field.dtype for field in host_fields(batch, options))
    return Rows(micro, rows, config.dataset.block_size, kinds)


def run(request: dict[str, Any], folder: Path) -> Result:
    """Trace, lower and compile the request; return the result."""
    job = Job(request, folder, ("torch", "torch-tpu", "jax", "libtpu"))
    program = lower(job.config, request["architecture"])
    job.lap("trace")
    job.result["state_bytes"] = program.state_bytes
    return job.finish(program.module_for("tpu"), spmd=False)


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:], run))
