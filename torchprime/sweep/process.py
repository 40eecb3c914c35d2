"""The processes in which the runs of a sweep are made, one at a time.

A run that has the same step as the one before may follow in its process, which has that step
compiled (config/many_runs/further.py). Any other run gets a new process.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from torchprime.config.load import flat_keys
from torchprime.config.many_runs.further import VARIABLE
from torchprime.config.many_runs.processes import Ended, exit_code, forwarding
from torchprime.config.schema import TrainConfig
from torchprime.files.atomic import open_plain
from torchprime.sweep.jobs import INCIDENTAL, SweepJob
from torchprime.text.terminal import say

APPEND = os.O_WRONLY | os.O_CREAT | os.O_APPEND
KEPT_LINES = 60  # of a run's messages, in which the reason of a failure is looked for
MOST_CHARACTERS = 600  # of that reason
POLL_SECONDS = 0.1
OF_THIS_PROCESS = "USE_TORCH_XLA"  # set by command.py
# By prefix: keys that leave the compiled step as it is.
NOT_OF_THE_STEP = (
    *INCIDENTAL, "seed", "selection", "export", "eval", "task.max_steps", "task.num_epochs",
    "task.optimizer.learning_rate", "task.lr_scheduler", "task.export_checkpoint_path",
    "task.sample_prompts", "dataset",
)  # fmt: skip
OF_THE_STEP = ("dataset.block_size", "dataset.replay_schedule", "dataset.mixture")


def same_step(one: TrainConfig, other: TrainConfig) -> bool:
    """Return True if both runs have the same devices and the same step, but for its data."""
    return _step(one) == _step(other)


def _step(config: TrainConfig) -> dict[str, object]:
    return {
        key: value
        for key, value in flat_keys(config.to_dict())
        if key.startswith(OF_THE_STEP) or not key.startswith(NOT_OF_THE_STEP)
    }


class RunProcesses:
    """The process of the present run of a sweep, and of those that may follow in it.

    Args:
        program: the command line that starts a run, up to the run's own arguments.
    """

    def __init__(self, program: Sequence[str]) -> None:
        self._program = list(program)
        self._child: _Child | None = None

    def run(self, job: SweepJob, log: Path) -> Ended:
        """Make one run and wait for its end.

        Args:
            log: the file to which its messages are added.
        """
        child = self._child
        if child is None or not child.takes(job):
            self.close()
            child = self._child = _Child(self._program, job, log)
        else:
            child.follow(job, log)
        with forwarding(child.process) as received:
            code = child.wait()
        if code is not None:
            self._child = None
        message = child.reason(code) if code else ""
        return Ended(code or 0, bool(received), message)

    def close(self) -> None:
        """Let the process end, if one is waiting for a further run."""
        if self._child is not None:
            self._child.end()
            self._child = None


class _Child:
    """A process that makes a run, and further ones."""

    def __init__(self, program: Sequence[str], job: SweepJob, log: Path) -> None:
        inherited = {key: value for key, value in os.environ.items() if key != OF_THIS_PROCESS}
        there, self._commands = os.pipe()
        self._ends, back = os.pipe()
        self._log, self._lines = log, deque[str](maxlen=KEPT_LINES)
        self._config = job.config
        try:
            self.process = subprocess.Popen(
                [*program, *job.argv],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,  # so that a signal reaches it once: from this process
                pass_fds=(there, back),
                env={**inherited, VARIABLE: f"{there},{back}"},
            )
        finally:
            os.close(there)
            os.close(back)
        assert self.process.stderr is not None
        self._reader = threading.Thread(target=self._read, args=(self.process.stderr,), daemon=True)
        self._reader.start()

    def takes(self, job: SweepJob) -> bool:
        """Return True if a run may follow here."""
        return self.process.poll() is None and same_step(self._config, job.config)

    def follow(self, job: SweepJob, log: Path) -> None:
        """Begin a further run."""
        self._log, self._config = log, job.config
        self._lines.clear()
        os.write(self._commands, f"{json.dumps(job.argv)}\n".encode())

    def wait(self) -> int | None:
        """Wait for the end of the run; return the exit code of the process, or None if it waits for
        a further run."""
        while self.process.poll() is None:
            if select.select([self._ends], [], [], POLL_SECONDS)[0]:
                if os.read(self._ends, 100):
                    return None
                break  # closed: the process ends
        return self.end()

    def end(self) -> int:
        """Wait for the end of the process; it gets no further run."""
        os.close(self._commands)
        code = exit_code(self.process.wait())
        self._reader.join(10)
        os.close(self._ends)
        return code

    def reason(self, code: int) -> str:
        """Return why the run failed, from its messages and its exit code."""
        lines = [line for line in self._lines if line.strip()]
        told = [n for n, line in enumerate(lines) if line.startswith(("error: ", "stopped: "))]
        found = " ".join(lines[told[-1] :] if told else lines[-1:]).removeprefix("error: ")
        if code > 128 and not told:
            name = signal.Signals(code - 128).name if code - 128 in set(signal.Signals) else code
            found = f"the process ended by {name}. {found}"
        return found[:MOST_CHARACTERS] or f"exit code {code}"

    def _read(self, messages: BinaryIO) -> None:
        """Pass messages on to this process' own, to the log, and to the lines of `reason`."""
        for line in messages:
            text = line.decode(errors="replace").rstrip("\n")
            say(text, sys.stderr)
            self._lines.append(text)
            with os.fdopen(open_plain(self._log, APPEND), "a", encoding="utf-8") as file:
                file.write(f"{text}\n")
