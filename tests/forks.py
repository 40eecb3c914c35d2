"""Processes that start at once: forked from one that has imported everything and computed nothing.

Importing torch and transformers costs a process about five seconds, more than most tests' own work.
A `ForkServer` pays that once. Each process is a fork of it, so it has the memory of a new one and
goes through the script's own entry point. `python forks.py` is the server: a request is a line of
JSON on stdin, so is the answer on stdout.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

from torchprime.config.compose import compose_config

# Modules that the native backend's entry points import, some only when they run.
PRELOADED = (
    "pandas",
    "tensorboard.compat.proto.event_pb2",
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "torch.nn.attention.flex_attention",
    "torchprime.report.write",
    "torchprime.torch_native.backend",
    "torchprime.training.sft",
    "transformers.models.llama.modeling_llama",
    "transformers.models.mistral.modeling_mistral",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.qwen3.modeling_qwen3",
    "transformers.optimization",
)


class Ended(NamedTuple):
    """The exit code of a process, and its output on stdout and stderr together."""

    code: int
    printed: str


class ForkServer:
    """A process that starts others by forking.

    Args:
        preload: modules to import besides `PRELOADED`.
    """

    def __init__(self, preload: Sequence[str] = ()) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "USE_TORCH_XLA": "0"}
        self._process = subprocess.Popen(
            [sys.executable, __file__, *PRELOADED, *preload],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            text=True,
        )
        self._logs = tempfile.TemporaryDirectory(prefix="torchprime-forks-")
        self._running: set[int] = set()
        self._count = 0

    def start(self, script: Path, *argv: str, **environment: str) -> Fork:
        """Run a script in a process of its own, as `python script argv` would."""
        self._count += 1
        log = Path(self._logs.name) / f"{self._count}.txt"
        pid = self._ask(script=str(script), argv=list(argv), environment=environment, log=str(log))[
            "pid"
        ]
        self._running.add(pid)
        return Fork(self, pid, log)

    def group(self, processes: int, script: Path, *argv: str, **environment: str) -> list[Fork]:
        """Start the ranks of a process group on this host, as torchrun does."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
        place |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        return [
            self.start(script, *argv, **place, RANK=str(rank), LOCAL_RANK=str(rank))
            for rank in range(processes)
        ]

    def wait(self, pid: int, seconds: float) -> int:
        """The exit code of a process, which is killed if it takes longer than that."""
        code = self._ask(wait=pid, seconds=seconds)["code"]
        self._running.discard(pid)
        return code

    def kill(self, pid: int) -> None:
        """End a process if it has not ended."""
        if pid in self._running:
            os.kill(pid, signal.SIGKILL)  # not yet waited for, so the id is still its own
            self.wait(pid, 10)

    def close(self) -> None:
        """End the server and what it started."""
        for pid in list(self._running):
            self.kill(pid)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._logs.cleanup()

    def _ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())


class Fork(NamedTuple):
    """One process of a server."""

    server: ForkServer
    pid: int
    log: Path

    def end(self, seconds: float = 120) -> Ended:
        """Wait for its end."""
        code = self.server.wait(self.pid, seconds)
        return Ended(code, self.log.read_text())

    def kill(self) -> None:
        self.server.kill(self.pid)


# The server ---------------------------------------------------------------------------------------


def serve() -> dict[str, Any] | None:
    """Answer requests until stdin ends; in a forked process, return what it shall run."""
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = {"code": wait(request["wait"], request["seconds"])}
        else:
            pid = os.fork()
            if pid == 0:
                return request
            answer = {"pid": pid}
        print(json.dumps(answer), flush=True)
    return None


def wait(pid: int, seconds: float) -> int:
    """The exit code, negative for a signal, as subprocess has it."""
    until = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def run(request: Mapping[str, Any]) -> None:
    """Become the process that was asked for."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(request["environment"])
    sys.argv = [request["script"], *request["argv"]]
    sys.path[0] = str(Path(request["script"]).parent)
    code = 1
    try:
        runpy.run_path(request["script"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        leave(code)


def leave(code: int) -> NoReturn:
    """End as Python does, but without taking every module apart, which would copy the memory that
    is shared with the server."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main(modules: Sequence[str]) -> None:
    for name in modules:
        importlib.import_module(name)
    compose_config(["model.pretrained_model=x", "task.max_steps=1"])  # hydra imports late, too
    torch.set_num_threads(1)  # a forked child has no other threads
    assert threading.active_count() == 1, "a fork would lose the other threads"
    gc.freeze()  # the children's collections leave shared memory alone
    request = serve()
    if request is not None:
        run(request)


if __name__ == "__main__":
    main(sys.argv[1:])
