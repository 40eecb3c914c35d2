"""Parts of a process that compiles a step: its start, its end and its clock.

A runtime's worker is such a process (apart.py). It has the runtime's own tracing and lowering.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from torchprime.compiling.executables import end_with
from torchprime.errors import UserError
from torchprime.files.atomic import write_text
from torchprime.installed import installed_versions
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


def first_result(devices: Sequence[Any], packages: Iterable[str]) -> Result:
    """Return the part of a result that is known before tracing."""
    return {
        "versions": installed_versions(packages),
        "compiler": devices[0].client.platform_version,
        "flags": os.environ.get("LIBTPU_INIT_ARGS", "").split(),
        "seconds": {},
    }


class Laps:
    """A clock that notes the seconds of each stage in a result, and prints them."""

    def __init__(self, result: Result) -> None:
        self.seconds, self.last = result["seconds"], time.perf_counter()

    def __call__(self, name: str) -> None:
        """End a stage."""
        now = time.perf_counter()
        self.seconds[name], self.last = now - self.last, now
        print_lines([f"{name} {self.seconds[name]:.1f} s"])
