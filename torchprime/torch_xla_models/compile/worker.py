"""The process that compiles one step with the TPU compiler; it is separate because libtpu can end
it.

    python -m torchprime.torch_xla_models.compile.worker REQUEST.json FOLDER PID

The request holds a config and an architecture. The environment was set by process PID, which waits
(command.py), since torch_xla and jax read it when imported. The results go into FOLDER: result.json
(config, memory, or the compiler's message), program.txt, the partitioned and scheduled program of
one chip. The request may name a file for the module in jax's portable format (executables.py).

Tracing happens on virtual CPU devices, fewer than chips if autograd could not count them. Code
that asks for the device gets the TPU whose description libtpu gives: its mesh follows the
links between chips, splash attention is lowered for it, and torch_xla uses its TPU lowerings.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch_xla.core.xla_model as xm
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from jax._src import tpu_custom_call
from jax._src.interpreters import mlir as jax_mlir
from jax.sharding import Mesh as JaxMesh
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]
from jaxlib.mlir import ir

from torchprime.compiling.tracing import step_parts
from torchprime.compiling.worker import Job, Result, worker_main
from torchprime.config.schema import TrainConfig
from torchprime.config.topologies import topology
from torchprime.torch_xla_models.compile.tracing import (
    Argument,
    Lowered,
    Placeholders,
    trace_step,
)
from torchprime.torch_xla_models.train import make_backend

# The newest version of the kernels' intermediate language that libtpu 0.0.21 reads; jax 0.7.1
# writes a newer one if it has no TPU to ask.
KERNEL_IR_VERSION = 7


def pretend(devices: Sequence[Any], name: str) -> None:
    """Make later tracing treat the CPU's virtual devices as these devices of the named slice."""
    attributes = [_attributes(ordinal, device) for ordinal, device in enumerate(devices)]

    def jax_mesh(mesh: xs.Mesh) -> JaxMesh:
        ids = np.array(mesh.device_ids).reshape(mesh.mesh_shape)
        places = np.vectorize(lambda number: devices[number], otypes=[object])(ids)
        return JaxMesh(places, mesh.axis_names or ())

    xr.global_runtime_device_attributes = lambda: [dict(each) for each in attributes]
    xr.global_runtime_device_count = lambda: len(devices)
    xm.xla_device_hw = lambda device: "TPU"
    xs.Mesh.get_jax_mesh = jax_mesh  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_use_shardy_partitioner", False)
    jax.config.update("jax_default_device", devices[0])
    tpu_custom_call.get_ir_version = lambda ctx: KERNEL_IR_VERSION
    # Read at each use; the client is the CPU's already. (With TPU_ACCELERATOR_TYPE set, libtpu ends
    # the process in cost_analysis.)
    os.environ.update(PJRT_DEVICE="TPU", ACCELERATOR_TYPE=name)


def _attributes(ordinal: int, device: Any) -> dict[str, Any]:
    """Return the attributes that torch_xla gives for a TPU device, for its mesh."""
    found = {"name": f"TPU:{ordinal}", "coords": list(device.coords), "core_on_chip": 0}
    number = getattr(device, "slice_index", None)
    return found if number is None else {**found, "slice_index": number}


def trace(config: TrainConfig, architecture: dict[str, Any]) -> Lowered:
    """Return the config's training step."""
    backend = make_backend(config, make_tensors=Placeholders)
    return trace_step(backend, step_parts(config, architecture))


def annotated(lowered: Lowered) -> bytes:
    """Return StableHLO whose arguments have their sharding and a flag if they may be written over:
    torch_xla passes both to the compiler if tensors hold data."""
    text = _jax.mlir.xla_computation_to_mlir_module(_jax.XlaComputation(lowered.hlo))
    with jax_mlir.make_ir_context():
        module = ir.Module.parse(text)
        main = next(op for op in module.body.operations if _symbol(op) == "main")
        given = list(ir.ArrayAttr(main.operation.attributes["arg_attrs"]))
        main.operation.attributes["arg_attrs"] = ir.ArrayAttr.get(
            [_with(attrs, lowered.arguments.get(place)) for place, attrs in enumerate(given)]
        )
        return jax_mlir.module_to_bytecode(module)


def _symbol(op: Any) -> str | None:
    name = "sym_name"
    return ir.StringAttr(op.attributes[name]).value if name in op.attributes else None


def _with(attributes: Any, argument: Argument | None) -> Any:
    found = {each.name: each.attr for each in ir.DictAttr(attributes)}
    if argument is not None:
        found["mhlo.sharding"] = ir.StringAttr.get(argument.sharding)
        if argument.donated:
            found["jax.buffer_donor"] = ir.BoolAttr.get(True)
    return ir.DictAttr.get(found)


def run(request: dict[str, Any], folder: Path) -> Result:
    """Trace, lower and compile the request; return the result."""
    xr.use_spmd()
    xr.global_runtime_device_count()  # starts the CPU's client
    job = Job(request, folder, ("torch", "torch_xla", "jax", "libtpu"))
    pretend(job.devices, topology(request["topology"]).name)
    lowered = trace(job.config, request["architecture"])
    job.lap("trace")
    module = annotated(lowered)
    job.result["arguments"] = len(lowered.arguments)
    del lowered
    return job.finish(module, spmd=True)


if __name__ == "__main__":
    sys.exit(worker_main(sys.argv[1:], run))
