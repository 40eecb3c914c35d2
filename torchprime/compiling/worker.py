"""Parts of a process that compiles a step: its request, its end and its clock.

A runtime's worker is such a process (apart.py). It adds the runtime's own tracing and lowering.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchprime.compiling.executables import compiled, end_with, parse, to_portable, tpu_devices
from torchprime.config.load import load_config
from torchprime.config.topologies import topology
from torchprime.errors import UserError
from torchprime.files.atomic import write_text
from torchprime.installed import installed_versions
from torchprime.metrics.throughput import host_memory_bytes
from torchprime.text.terminal import print_lines

Result = dict[str, Any]


def worker_main(argv: Sequence[str], run: Callable[[dict[str, Any], Path], Result]) -> int:
    """Run a request and return 0 if result.json is written, whatever its content.

    Args:
        argv: a file with the request, the folder for the results, the process that waits.
        run: maps request and folder to the result.
    """
    end_with(int(argv[2]))
    request, folder = json.loads(Path(argv[0]).read_text()), Path(argv[1])
    try:
        result = run(request, folder)
    except UserError as error:
        result = {"user_error": str(error)}
    write_text(folder / "result.json", json.dumps(result))
    return 0


class Job:
    """A request on its way to a result: the slice's devices, and a clock of the stages.

    Args:
        folder: for the program.
        packages: whose versions the result names.
    """

    def __init__(self, request: Mapping[str, Any], folder: Path, packages: Iterable[str]) -> None:
        self.request, self.folder = request, folder
        self.config, slice_ = load_config(request["config"]), topology(request["topology"])
        self.devices = tpu_devices(slice_.libtpu_name, slice_.host_shape, request["slices"])
        assert len(self.devices) == self.config.device_count
        self.result: Result = {
            "versions": installed_versions(packages),
            "compiler": self.devices[0].client.platform_version,
            "flags": os.environ.get("LIBTPU_INIT_ARGS", "").split(),
            "seconds": {},
        }
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        """Note and print the seconds of the stage that ends here."""
        now = time.perf_counter()
        self.result["seconds"][stage], self._last = now - self._last, now
        print_lines([f"{stage} {self.result['seconds'][stage]:.1f} s"])

    def finish(self, module: bytes, *, spmd: bool) -> Result:
        """Write the lowered module in jax's portable format and compile it, each if the request
        says so; return the result.

        Args:
            spmd: the module is of all chips and the compiler cuts it; else it is of one chip.
        """
        self.result["module_bytes"] = len(module)
        if self.request["portable"] is not None:
            Path(self.request["portable"]).write_bytes(to_portable(module))
        self.lap("lower")
        if self.request["compile"]:
            self.result |= compiled(self.devices, parse(module), self.folder, spmd=spmd)
            self.lap("compile")
            self.result["host_memory_bytes"] = host_memory_bytes()
        return self.result
