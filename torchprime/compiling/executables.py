"""A module of StableHLO through the compiler of a slice, and the numbers of the result.

Used by the runtimes' workers, and run as a script in another environment with a newer jax and
libtpu:

    PYTHON -I executables.py REQUEST.json FOLDER PID

So it imports jax and the standard library only, and keeps to what jax 0.7.1 and 0.12 both have.
The request names the slice and the module in jax's portable format, which newer versions read.
Process PID waits for the result. It goes into FOLDER: program.txt, and result.json with the memory
or the compiler's message.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jax._src.interpreters import mlir as jax_mlir
from jax.experimental import topologies
from jaxlib import xla_client
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo as _stablehlo

stablehlo: Any = _stablehlo  # made of a compiled module, of which the type checker sees half
PR_SET_PDEATHSIG = 1  # from linux/prctl.h


def tpu_devices(libtpu_name: str, host_shape: Sequence[int], slices: int) -> list[Any]:
    """Return the devices of a TPU that this host does not have, in the order of their ids."""
    many = {"num_slices": slices} if slices > 1 else {}
    description = topologies.get_topology_desc(
        platform="tpu",
        topology_name=libtpu_name,
        chips_per_host_bounds=tuple(host_shape),
        **many,
    )
    return sorted(description.devices, key=lambda device: device.id)


def parse(module: bytes) -> Any:
    """Return a module of StableHLO from its bytecode."""
    with jax_mlir.make_ir_context():
        return ir.Module.parse(module)


def to_portable(module: bytes) -> bytes:
    """Return a module in the format that other versions of jax read too."""
    with jax_mlir.make_ir_context():
        version = stablehlo.get_current_version()
        parsed = ir.Module.parse(module)
        return stablehlo.serialize_portable_artifact(parsed, version)


def compile_for(devices: Sequence[Any], module: Any, dump: Path, *, spmd: bool) -> Any:
    """Return the executable.

    Args:
        dump: an empty folder, where the compiler writes the program's text too.
        spmd: the module is of all chips, and is cut with the options that torch_xla gives; else it
            is of one chip, and all chips run it.
    """
    ids = np.array([[d.id for d in devices]])
    assignment = xla_client.DeviceAssignment.create(ids if spmd else ids.T)
    replicas, partitions = (1, len(devices)) if spmd else (len(devices), 1)
    options = xla_client.CompileOptions()
    options.num_replicas, options.num_partitions = replicas, partitions
    options.device_assignment = assignment
    build = options.executable_build_options
    build.num_replicas, build.num_partitions = replicas, partitions
    build.device_assignment = assignment
    build.debug_options.xla_dump_to = str(dump)
    build.debug_options.xla_dump_hlo_as_text = True
    if spmd:
        build.use_spmd_partitioning = True
        build.use_shardy_partitioner = False
        build.allow_spmd_sharding_propagation_to_output = [True]
    return devices[0].client.compile(
        module,
        executable_devices=xla_client.DeviceList(tuple(devices)),
        compile_options=options,
    )


def measures(executable: Any) -> dict[str, Any]:
    """Return the bytes of one chip by use."""
    stats = executable.get_compiled_memory_stats()
    names = [name for name in dir(stats) if name.endswith("_size_in_bytes")]
    return {"memory": {name.removesuffix("_size_in_bytes"): getattr(stats, name) for name in names}}


def version_of(package: str) -> str | None:
    """Return the version of an installed package, None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    """Return the versions that a report names."""
    return {name: version_of(name) for name in ("jax", "jaxlib", "libtpu")}


def write_new(path: Path, text: str) -> None:
    """Write a new file in the place of an older one, never through a link."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "w") as file:
        file.write(text)


def end_with(parent: int) -> None:
    """Have the kernel end this process with its parent, since nobody waits for the result then. A
    parent that ends in order does so itself (`apart.run_apart`)."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before
        sys.exit("The command that asked for this compile has ended.")


def _executable(devices: Sequence[Any], module: Any, dump: Path, spmd: bool) -> Any:
    try:
        return compile_for(devices, module, dump, spmd=spmd)
    except TypeError:  # jax 0.7.1 takes bytes only
        return compile_for(devices, jax_mlir.module_to_bytecode(module), dump, spmd=spmd)


def compiled(devices: Sequence[Any], module: Any, folder: Path, *, spmd: bool) -> dict[str, Any]:
    """Compile a module, write its program to program.txt, and return `memory`, or the compiler's
    message as `error`."""
    with tempfile.TemporaryDirectory(prefix="torchprime-program-") as dump:
        try:
            executable = _executable(devices, module, Path(dump), spmd)
        except (RuntimeError, ValueError) as error:  # jaxlib's own are RuntimeErrors
            return {"error": str(error)}
        write_new(folder / "program.txt", program_text(executable, Path(dump)))
    return measures(executable)


def program_text(executable: Any, dump: Path) -> str:
    """Return the compiled program's text.

    Args:
        dump: the folder where the compiler wrote it. jaxlib refuses operations that only a newer
            libtpu has, such as a lookup that the SparseCores do.
    """
    try:
        (program,) = executable.hlo_modules()
        return program.to_string()
    except RuntimeError:
        written = dump.glob("*.after_codegen.txt")  # the only one with the compiler's cycles
        return max(written, key=lambda path: path.stat().st_size).read_text()


def run(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Compile the request's module; return the result."""
    began = time.perf_counter()
    devices = tpu_devices(request["libtpu_name"], request["host_shape"], request["slices"])
    result: dict[str, Any] = {
        "versions": versions(),
        "compiler": devices[0].client.platform_version,
        "flags": os.environ.get("LIBTPU_INIT_ARGS", "").split(),
    }
    with jax_mlir.make_ir_context() as context:
        portable = Path(request["module"]).read_bytes()
        module = stablehlo.deserialize_portable_artifact(context, portable)
        result |= compiled(devices, module, folder, spmd=request["spmd"])
    return {**result, "seconds": {"compile": time.perf_counter() - began}}


def main(argv: list[str]) -> None:
    """Compile and write result.json, whatever its content."""
    end_with(int(argv[2]))
    request, folder = json.loads(Path(argv[0]).read_text()), Path(argv[1])
    write_new(folder / "result.json", json.dumps(run(request, folder)))


if __name__ == "__main__":
    main(sys.argv[1:])
