"""Several runs of one command: all are composed and checked, then each runs in its own process.

A run sets state for its whole process: the number of XLA devices, the process group. A second run
in the same process would find the state of the first. So each job starts the same program again
with the job's own command line, which its run.json also records.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, NamedTuple

from torchprime.config.many_runs.jobs import Job
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError
from torchprime.text.terminal import say

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def this_program(argv: Sequence[str]) -> list[str]:
    """Return the command line that started this process, up to the start of `argv`.

    Raises:
        ConfigError: torchrun started it, or it did not come from a command line.
    """
    if "WORLD_SIZE" in os.environ:
        raise ConfigError(
            "-m: given under torchrun, which can start one run only. Let the shell start one "
            "torchrun for each run: for MESH in fsdp2 fsdp4; do torchrun --standalone "
            "--nproc_per_node=N -m torchprime.torch_native.train mesh=$MESH run_name=$MESH; done"
        )
    given, count = sys.argv[1:], len(sys.argv) - 1
    whole = sys.orig_argv[1:]
    known = count == 0 or whole[-count:] == given
    if not known or len(argv) > count or given[count - len(argv) :] != list(argv):
        raise ConfigError(
            "-m: each run gets a process of its own, which starts this program's command line "
            "again, but this call did not come from one. Make one call for each run."
        )
    return [sys.executable, *whole[: len(whole) - len(argv)]]


class Ended(NamedTuple):
    """The end of a run; `stopped` if this process was asked to stop meanwhile."""

    code: int
    stopped: bool
    message: str = ""


def run_jobs(jobs: Sequence[Job], program: Sequence[str]) -> int:
    """Run each job in its own process, one after another; return the first nonzero exit code.

    A failed job does not stop the others. A signal goes to the running job, which may save a
    checkpoint; later jobs are not started.
    """
    advice = "Leave run_name out: each job then gets the config's name and its number."
    refuse_shared_folders([job.config for job in jobs], advice)
    labels, codes = _labels(jobs), []
    for number, job in enumerate(jobs):
        say(f"job {number + 1} of {len(jobs)}: {labels[number]}")
        ended = _run([*program, *job.argv])
        codes.append(ended.code)
        if ended.stopped:
            break
    say("")
    for number, (job, label) in enumerate(zip(jobs, labels, strict=True)):
        how = f"exit code {codes[number]}" if number < len(codes) else "not started"
        folder = f"{job.config.output_dir}/{job.config.run_name}"
        say(f"job {number + 1} of {len(jobs)}: {how:<12}  {label}  {folder}")
    return next((code for code in codes if code), 0)


def _labels(jobs: Sequence[Job]) -> list[str]:
    """Return the overrides in which the jobs differ."""
    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    return [" ".join(each for each in job.overrides if each not in common) for job in jobs]


def refuse_shared_folders(configs: Sequence[TrainConfig], advice: str) -> None:
    """Raise a ConfigError with this advice if two runs would write the same folder."""
    seen: dict[tuple[str, str | None], int] = {}
    for number, config in enumerate(configs, start=1):
        place = config.output_dir, config.run_name
        if place in seen and not config.dry_run:
            raise ConfigError(
                f"-m: jobs {seen[place]} and {number} would both write {'/'.join(map(str, place))}."
                f" {advice}"
            )
        seen[place] = number


def _run(command: Sequence[str]) -> Ended:
    """Run in a separate session, so that a signal reaches the child once: from this process."""
    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)
    with forwarding(child) as received:
        code = child.wait()
    return Ended(exit_code(code), bool(received))


def exit_code(returned: int) -> int:
    """Return a process' exit code as a shell gives it: 128 and the number of a signal."""
    return 128 - returned if returned < 0 else returned


@contextmanager
def forwarding(child: subprocess.Popen) -> Iterator[list[int]]:
    """Forward signals to the child; yield the list of those received."""
    received: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if child.poll() is None:
            child.send_signal(number)

    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # set by nohup
                before[number] = signal.signal(number, hand_on)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
