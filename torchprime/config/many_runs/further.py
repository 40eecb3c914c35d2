"""Further runs in the process of a run, for a sweep on XLA.

XLA keeps compiled programs in the process, so a run with the same step need not compile it again.
The sweep's process sends the command of the next run through a pipe, and hears through another how
each run ended. When the first pipe closes, the sweep is gone: the run gets SIGTERM, at which it
saves a checkpoint.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading

VARIABLE = "TORCHPRIME_FURTHER_RUNS"  # the descriptors of both pipes, "in,out"


class FurtherRuns:
    """The runs that follow in this process.

    Args:
        commands: descriptor with one JSON list of arguments a line.
        ends: descriptor for the exit code of each run, one a line.
    """

    def __init__(self, commands: int, ends: int) -> None:
        self._ends = ends
        self._running = True
        self._next: queue.SimpleQueue[list[str] | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(commands,), daemon=True).start()

    @classmethod
    def from_environment(cls) -> FurtherRuns | None:
        """Return them if a sweep started this process; its own children get none."""
        given = os.environ.pop(VARIABLE, None)
        if given is None:
            return None
        commands, ends = map(int, given.split(","))
        for descriptor in (commands, ends):
            os.set_inheritable(descriptor, False)
        return cls(commands, ends)

    def after(self, code: int) -> list[str] | None:
        """Report the exit code of a run, and wait for the command of the next one.

        Returns:
            None if no other run may follow in this process: the run failed, or is not of XLA.
        """
        if code or "torch_xla" not in sys.modules:
            return None
        self._running = False
        try:
            os.write(self._ends, f"{code}\n".encode())
        except BrokenPipeError:
            return None
        given = self._next.get()
        self._running = given is not None
        return given

    def _read(self, commands: int) -> None:
        with os.fdopen(commands, encoding="utf-8") as lines:
            for line in lines:
                self._next.put(json.loads(line))
        self._next.put(None)
        if self._running:
            os.kill(os.getpid(), signal.SIGTERM)
