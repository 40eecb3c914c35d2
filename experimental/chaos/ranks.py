"""Two ranks of a run, of which one is killed, stopped or cut off: the other must end with a message
in time, and the same commands must go on as if nothing had happened.

    make chaos    # or: python experimental/chaos/ranks.py [--fates killed stopped] [--limit 8]

killed       SIGKILL: its connections close
stopped      SIGSTOP: they stay open, and nobody answers
partitioned  the ranks are on hosts of their own (cable.py), and the cable between them is cut;
             left out where this machine does not allow it: the report has the reason

It happens in a step, in a checkpoint, in an evaluation, in an export and while one rank waits for
the other's export; to the rank that writes, and to the one that does not. A rank that has lost its
partner has the limit (TORCHPRIME_TIMEOUT_SECONDS) to notice it, and ends with a message of one
line. Then both are started again: their records, last checkpoint and export must be, bit for bit,
those of two ranks that nothing disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, NamedTuple

# Before torch: it says that there is one thread, which forks keep.
from run import ENTRIES, Starter, check_same, command_line, run_whole, message_fault, write_rows  # isort: skip
from cable import Cable, laid  # isort: skip

import torch

from torchprime.config.entry import run_main
from torchprime.torch_native import train
from torchprime.torch_native.backend import NativeBackend
from torchprime.torch_native.runtime import TIMEOUT_VARIABLE
from torchprime.training.run import export as exporting
from torchprime.training.run import final_export
from torchprime.training.run import saver as saving

KILLED, STOPPED, PARTITIONED = FATES = ("killed", "stopped", "partitioned")
STEP, SAVE, EVALUATION, EXPORT, WAIT = PHASES = (
    "step", "checkpoint", "evaluation", "export", "waiting for the export",
)  # fmt: skip
LATE = 10.0  # seconds beyond the limit that a rank may take to say why and to end
PATIENCE = 300.0  # seconds for an attempt that nothing disturbs


class Case(NamedTuple):
    """One case: the fate of a rank in a phase of the run."""

    fate: str
    phase: str
    rank: int

    def __str__(self) -> str:
        return f"rank {self.rank} {self.fate} in {self.phase}"


# The ranks ----------------------------------------------------------------------------------------


class Pair:
    """Starts two ranks of one run, forked from this process, which has imported all they need."""

    def __init__(self, work: Path, limit: float, cable: Cable | None) -> None:
        self.work, self.limit, self.cable = work, limit, cable
        self.port = 29600
        self.alive: set[int] = set()

    def start(self, folder: Path, case: Case | None) -> list[int]:
        """Start both ranks; return their process ids by rank."""
        self.port += 1  # the one before may not be free yet
        cable = self.cable if case is not None and case.fate == PARTITIONED else None
        processes = [self._fork(rank, folder, case, cable) for rank in range(2)]
        self.alive.update(processes)
        return processes

    def wait_for(self, process: int, until: float) -> int | None:
        """Exit code of a process, minus a signal's number; None if it has not ended by then."""
        while time.monotonic() < until:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                self.alive.discard(process)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return None

    def end_all(self) -> None:
        """Kill what is left, also what is stopped."""
        for process in self.alive:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(process, signal.SIGKILL)
                os.waitpid(process, 0)
        self.alive.clear()

    def log(self, folder: Path, rank: int) -> Path:
        return self.work / f"{folder.name}.rank{rank}.txt"

    def _fork(self, rank: int, folder: Path, case: Case | None, cable: Cable | None) -> int:
        child = os.fork()
        if child:
            return child
        code = 99
        try:
            with self.log(folder, rank).open("ab") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "2",
                "MASTER_ADDR": "127.0.0.1" if cable is None else cable.addresses[0],
                "MASTER_PORT": str(self.port),
                TIMEOUT_VARIABLE: str(PATIENCE if case is None else self.limit),
            }
            if cable is not None:
                os.environ["GLOO_SOCKET_IFNAME"] = cable.names[rank]
                cable.enter(rank)
            if case is not None and case.rank == rank:
                arm(case, self.work / "hit", cable)
            code = run_main(train.main, [*command_line(folder), "ici_mesh.fsdp=2"])
            threading._shutdown()  # type: ignore[attr-defined]  # as a program's end waits
        finally:  # never back into the parent's code, whatever happened
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)


def arm(case: Case, mark: Path, cable: Cable | None) -> None:
    """Let the fate come at a call in the phase, once; the mark says when."""

    def happen() -> None:
        mark.write_text(str(time.time()))
        if case.fate == PARTITIONED:
            assert cable is not None
            cable.cut(case.rank)
        else:
            os.kill(os.getpid(), signal.SIGKILL if case.fate == KILLED else signal.SIGSTOP)

    if case.phase == STEP:
        _before(NativeBackend, "train_step", 5, happen)
    elif case.phase == SAVE:
        _before(saving, "write_shards", 3, happen)
    elif case.phase == EVALUATION:  # the first is before step 1
        _before(NativeBackend, "read_eval", 2, happen)
    elif case.phase == WAIT:
        # Not the class itself, by which other work of the first process is waited for, too.
        class Waiting(final_export.LongWork):
            def end(self, answer: Any) -> Any:
                happen()
                return super().end(answer)

        final_export.LongWork = Waiting
    elif case.rank == 0:
        _before(exporting, "certify", 1, happen)
    else:
        _before(NativeBackend, "weights", 1, happen)


def _before(owner: Any, name: str, number: int, happen: Callable[[], None]) -> None:
    """Let it happen before so many a call of a function or method."""
    plain, calls = getattr(owner, name), 0

    def wrapped(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            happen()
        return plain(*args, **options)

    setattr(owner, name, wrapped)


# A case -------------------------------------------------------------------------------------------


def run_both(pair: Pair, folder: Path) -> None:
    """Run two ranks undisturbed."""
    until = time.monotonic() + PATIENCE
    codes = [pair.wait_for(process, until) for process in pair.start(folder, None)]
    if codes != [0, 0]:
        sys.exit(f"{folder}: exit codes {codes}, expected 0 and 0; see {pair.log(folder, 0)}")


def disturb(pair: Pair, folder: Path, case: Case) -> float:
    """Let the case happen; return the seconds until every rank that could end has ended."""
    mark = pair.work / "hit"
    mark.unlink(missing_ok=True)
    processes = pair.start(folder, case)
    until = time.monotonic() + PATIENCE
    while not mark.exists():
        if time.monotonic() > until:
            sys.exit(f"{case}: it did not happen; see {pair.log(folder, case.rank)}")
        time.sleep(0.005)
    began = time.monotonic()
    others = [1 - case.rank] if case.fate != PARTITIONED else [0, 1]
    for rank in others:
        code = pair.wait_for(processes[rank], began + pair.limit + LATE)
        if code is None:
            sys.exit(f"{case}: rank {rank} still waits after {pair.limit + LATE:g} s")
        said = pair.log(folder, rank).read_text(errors="replace")
        check_end(case, rank, code, said)
    took = time.monotonic() - began
    pair.end_all()
    return took


def check_end(case: Case, rank: int, code: int, said: str) -> None:
    """Exit unless a rank that was left alone ended with its message. The first rank needs no other
    to finish an export."""
    alone = case.phase == WAIT or (case.phase == EXPORT and case.rank == 0)
    wanted = 0 if rank == 0 and alone else 2
    if code != wanted:
        sys.exit(f"{case}: rank {rank} ended with exit code {code}, expected {wanted}")
    if code and (why := message_fault(said, rank)):
        sys.exit(f"{case}: rank {rank} {why}: {said[-4000:]}")


def storm(pair: Pair, whole: Path, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Run all cases, one after another."""
    found = []
    for case in cases:
        folder = pair.work / "run"
        shutil.rmtree(folder, ignore_errors=True)
        for each in range(2):
            pair.log(folder, each).unlink(missing_ok=True)
        took = disturb(pair, folder, case)
        if case.fate == PARTITIONED and pair.cable is not None:
            pair.cable.mend()
        run_both(pair, folder)
        check_same(folder, whole)
        print(f"{case}: over after {took:.1f} s, and went on", file=sys.stderr, flush=True)
        found.append({**case._asdict(), "seconds": round(took, 1)})
    return found


def cases_of(fate: str, few: bool) -> list[Case]:
    """Each phase with each rank; with one of the two, alternately, if `few`."""
    return [
        Case(fate, phase, rank)
        for number, phase in enumerate(PHASES)
        for rank in (1, 0)
        if (phase, rank) != (WAIT, 0)  # the rank that writes has no export to wait for
        and (not few or rank == (number + FATES.index(fate) + 1) % 2 or phase == WAIT)
    ]


def main() -> None:
    """Make the rows, go through the cases, print the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fates", nargs="+", choices=FATES, default=list(FATES))
    parser.add_argument("--few", action="store_true", help="one rank for each fate and phase")
    parser.add_argument(
        "--limit", type=float, default=8.0, help="seconds a collective may take in a disturbed run"
    )
    parser.add_argument("--folder", type=Path, help="kept; a temporary one if not given")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["USE_TORCH_XLA"] = "0"
    fates, left_out = list(args.fates), {}
    with ExitStack() as stack:
        temporary = tempfile.TemporaryDirectory(prefix="torchprime-chaos-")
        work = Path(stack.enter_context(temporary)) if args.folder is None else args.folder
        cable = stack.enter_context(laid()) if PARTITIONED in fates else None
        if isinstance(cable, str):
            fates.remove(PARTITIONED)
            left_out, cable = {PARTITIONED: cable}, None
        pair = Pair(prepare(work.absolute()), args.limit, cable)
        stack.callback(pair.end_all)
        run_both(pair, pair.work / "whole")
        cases = [case for fate in fates for case in cases_of(fate, args.few)]
        found = storm(pair, pair.work / "whole", cases)
    print(json.dumps({"limit": args.limit, "left_out": left_out, "cases": found}, indent=2))


def prepare(work: Path) -> Path:
    """Write the rows, and import here all that a run imports."""
    work.mkdir(parents=True, exist_ok=True)
    os.environ["XDG_CACHE_HOME"] = str(work / "cache")
    write_rows(work)
    starter = Starter(ENTRIES["native"], False, work)
    run_whole(starter, work / "alone")
    starter.warm_up()
    return work


if __name__ == "__main__":
    main()
