"""A compiling process apart from the command, since a compiler that fails can end its process.

The process gets three arguments: a file with the request, the folder for its results, and the id of
the process that waits. It writes result.json there.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchprime.errors import RuntimeSetupError, UserError
from torchprime.files.atomic import open_new, write_text


def run_apart(
    command: Sequence[str],
    request: Mapping[str, Any],
    env: Mapping[str, str],
    folder: Path,
    limit_s: float,
) -> dict[str, Any]:
    """Run a command in a separate process and return its result.

    Raises:
        RuntimeSetupError: over the time limit, or the process ended without a result.
        UserError: what the config's step itself objects to.
    """
    with tempfile.TemporaryDirectory(prefix="torchprime-compile-") as scratch:
        asked, log = Path(scratch) / "request.json", Path(scratch) / "log.txt"
        write_text(asked, json.dumps(request))
        with open_new(log) as out:
            process = subprocess.Popen(
                [*command, str(asked), str(folder.absolute()), str(os.getpid())],
                env=dict(env),
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                raise RuntimeSetupError(
                    f"compile_time_limit: the compiler took longer than {limit_s / 60:g} minutes. "
                    "Allow it more (compile_time_limit=60); other work on this machine slows it. "
                    "Without remat.scan_layers=true it compiles all layers instead of one."
                ) from None
            finally:
                _end(process)
        path = folder / "result.json"
        if code != 0 or not path.is_file():
            raise RuntimeSetupError(_died(code, log.read_text(errors="replace")))
        result = json.loads(path.read_text())
        path.unlink()
    if "user_error" in result:
        raise UserError(result["user_error"])
    return result


def _end(process: subprocess.Popen[Any]) -> None:
    """End the process and all its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _died(code: int, log: str) -> str:
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    tail = "\n  ".join(log.strip().splitlines()[-12:])
    hint = " The host ran out of memory?" if code == -signal.SIGKILL else ""
    return f"The compiler's process ended with {how} and no result.{hint} It said last:\n  {tail}"
