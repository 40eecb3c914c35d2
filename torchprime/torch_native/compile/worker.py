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

import torch

from torchprime.attention_kernels.choice import Runtime, choose_kernel
from torchprime.compiling.executables import compiled, parse, to_portable, tpu_devices
from torchprime.compiling.worker import Laps, first_result, worker_main
from torchprime.config.load import load_config
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.model import SPLASH
from torchprime.config.topologies import topology
from torchprime.data.blocks.batch import empty_batch
from torchprime.metrics.throughput import host_memory_bytes
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM, replace_attention_cores
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.kernels import KernelAttention
from torchprime.torch_native.tpu.parameters import hold
from torchprime.torch_native.tpu.program import Program, make_program
from torchprime.torch_native.tpu.step import Rows, StepBuilder, Training
from torchprime.training.optim.groups import freeze_groups
from torchprime.training.setup.adapter import build_model
from torchprime.training.setup.recipe import (
    adapter_of,
    groups_of,
    optimizer_of,
    sharding_table,
    step_options,
)
from torchprime.training.step import host_fields


def lower(config: TrainConfig, architecture: Mapping[str, Any]) -> Program:
    """Return the config's training step of one chip.

    Raises:
        ConfigError: one program cannot compute it.
    """
    found = architecture_from_hf(architecture, where="model")
    dtype, mesh = getattr(torch, config.torch_dtype), config.mesh_shape()
    model = build_model(found, adapter_of(config), dtype)
    freeze_groups(model, groups_of(config))
    inject_attention(model, config)
    grid = Grid(mesh["data"], mesh["fsdp"], mesh["tensor"])
    options = step_options(config, max(1, len(config.dataset.mixture)))
    parts = hold(model, sharding_table(config, model), grid, dtype, remat=config.remat.selects)
    builder = StepBuilder(parts, Training(optimizer_of(config), options))
    return make_program(builder.build(rows_of(config, grid)))


def inject_attention(model: CausalLM, config: TrainConfig) -> None:
    """Put the config's attention kernel into every layer."""
    runtime = Runtime("TorchTPU", "TPU", calls_jax=False)
    name, _ = choose_kernel(config.model.attention_kernel, config.dataset.block_size, runtime)
    if name == SPLASH:
        replace_attention_cores(model, KernelAttention)


def rows_of(config: TrainConfig, grid: Grid) -> Rows:
    """Return the shape and the types of a chip's rows."""
    options = step_options(config, max(1, len(config.dataset.mixture)))
    batch = empty_batch((1, config.dataset.block_size), with_sources=options.num_sources > 1)
    micro = config.task.gradient_accumulation_steps
    rows = config.task.global_batch_size // micro // (grid.data * grid.fsdp)
    kinds = tuple(field.dtype for field in host_fields(batch, options))
    return Rows(micro, rows, config.dataset.block_size, kinds)


def run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Trace, lower and compile the request; return the result."""
    config, slice_ = load_config(request["config"]), topology(request["topology"])
    devices = tpu_devices(slice_.libtpu_name, slice_.host_shape, request["slices"])
    assert len(devices) == config.device_count
    result = first_result(devices, ("torch", "torch-tpu", "jax", "libtpu"))
    lap = Laps(result)
    program = lower(config, request["architecture"])
    lap("trace")
    module = program.module_for("tpu")
    result |= {"state_bytes": program.state_bytes, "module_bytes": len(module)}
    if request["portable"] is not None:
        Path(request["portable"]).write_bytes(to_portable(module))
    lap("lower")
    if not request["compile"]:
        return result
    result |= compiled(devices, parse(module), folder, spmd=False)
    lap("compile")
    result["host_memory_bytes"] = host_memory_bytes()
    return result


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:], run))
