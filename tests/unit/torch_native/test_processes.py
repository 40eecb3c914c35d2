"""Two real processes exchange objects in the loop and beside it, and agree on an error."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from typing import Any

RANK = """
import json, threading
from torchprime.errors import CheckpointError
from torchprime.torch_native.processes import make_processes
from torchprime.torch_native.runtime import start_processes, stop_processes

start_processes()
processes = make_processes()
beside, mine = [], processes.index

def exchange():
    for number in range(20):
        beside.append(processes.aside.gather(("beside", number, mine)))

def act():
    raise CheckpointError("no space left")

thread = threading.Thread(target=exchange)
if mine == 0:  # in another order on each
    thread.start()
loop = [processes.gather(("loop", number, mine)) for number in range(20)]
if mine == 1:
    thread.start()
thread.join()
try:
    processes.aside.first_does(act)
except CheckpointError as error:
    told = str(error)
print(json.dumps([processes.count, loop, beside, told, processes.largest(5 - mine)]))
stop_processes()
"""


def test_the_loop_and_a_thread_beside_it_are_not_confused() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RANK],
            env={
                **os.environ,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    ended = [process.communicate(timeout=300) for process in started]

    def wanted(name: str) -> list[Any]:
        return [[[name, number, rank] for rank in range(2)] for number in range(20)]

    for out, errors in ended:
        assert out, errors[-3000:]
        assert json.loads(out.splitlines()[-1]) == [
            2,
            wanted("loop"),
            wanted("beside"),
            "no space left",
            5,
        ]
