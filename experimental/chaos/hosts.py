"""Two hosts that train together: the cable between them is cut and mended, and hosts die.

    make chaos    # or: python experimental/chaos/hosts.py [--limit 10]

The hosts are network namespaces (cable.py), which needs root and the command `ip`; without them
the report is the reason. Each host runs torchrun --nnodes=2, with the same command in every case:

blink          the cable is cut in the middle of training and mended within the limit
               (TORCHPRIME_TIMEOUT_SECONDS): the run ends as if nothing had happened
cut            it stays cut: both hosts' commands end within the limit, with a message of one line
host 1 dies    its processes are killed and its end of the cable is dead: host 0's command ends so
host 0 dies    the same for the host that keeps torchrun's store and writes the records

no interface   nobody names the interface that connects the hosts, whose name is 127.0.0.1 to both:
               the message of one line names the way out

After `cut` and a death the cable is mended and both commands are given again. Records, the last
checkpoint and the export must be, bit for bit, those of two hosts that nothing disturbed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cable import Cable, laid  # isort: skip
from run import ENTRIES, STEPS, check_same, command_line, message_fault, write_rows  # isort: skip

from torchprime.torch_native.runtime import TIMEOUT_VARIABLE

BLINK, CUT, NO_INTERFACE = "blink", "cut", "no interface"
DEATHS = {"host 1 dies": 1, "host 0 dies": 0}
CASES = (BLINK, CUT, *DEATHS)
HIT_AT = 3  # so many steps are on record when it happens
BLINK_SECONDS = 2.0
LATE = 15.0  # seconds beyond the limit in which the commands have to end: torchrun takes its time
PATIENCE = 240.0  # seconds for a run that nothing disturbs
PORT = 29500


class Hosts:
    """Starts the two torchrun commands of a run."""

    def __init__(self, cable: Cable, limit: float, *, interface_named: bool = True) -> None:
        self.cable, self.limit, self.interface_named = cable, limit, interface_named

    def start(self, folder: Path, limit: float) -> list[subprocess.Popen[bytes]]:
        """Start both; return them by host."""
        return [self._start(host, folder, limit) for host in range(2)]

    def _start(self, host: int, folder: Path, limit: float) -> subprocess.Popen[bytes]:
        cable = self.cable
        torchrun = [sys.executable, "-m", "torch.distributed.run"]
        place = [
            "--nnodes=2",
            f"--node_rank={host}",
            f"--master_addr={cable.addresses[0]}",
            f"--master_port={PORT}",
        ]
        logs = [f"--log-dir={logs_of(folder)}/{host}", "--redirects=3"]
        job = ["-m", ENTRIES["native"], *command_line(folder), "ici_mesh.fsdp=2"]
        environment = os.environ | {TIMEOUT_VARIABLE: str(limit), "USE_TORCH_XLA": "0"}
        if self.interface_named:  # the machine's name is 127.0.0.1 to both
            environment["GLOO_SOCKET_IFNAME"] = cable.names[host]
        with agent_log(folder, host).open("ab") as log:
            return subprocess.Popen(
                [*cable.command(host), *torchrun, *place, *logs, *job],
                env=environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip


def logs_of(folder: Path) -> Path:
    """Return the folder for the output of a run's commands."""
    return folder.parent / f"{folder.name}.logs"


def agent_log(folder: Path, host: int) -> Path:
    """Return the output of a host's torchrun itself."""
    logs_of(folder).mkdir(exist_ok=True)
    return logs_of(folder) / f"torchrun{host}.txt"


def said(folder: Path, host: int) -> str:
    """Return the stderr of a host's training process, in all attempts."""
    found = sorted((logs_of(folder) / str(host)).rglob("stderr.log"))
    return "".join(each.read_text(errors="replace") for each in found)


def steps_recorded(folder: Path) -> int:
    """Training steps on record."""
    records = folder / "metrics.jsonl"
    return records.read_text().count('"kind": "train"') if records.is_file() else 0


def fail(case: str, folder: Path, why: str) -> None:
    ends = "\n".join(said(folder, host)[-1500:] for host in range(2))
    sys.exit(f"{case}: {why}; see {logs_of(folder)}:\n{ends}")


# A case -------------------------------------------------------------------------------------------


def wait_for(commands: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int | None]:
    """Return the exit codes; None for a command that has not ended by then."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and any(each.poll() is None for each in commands):
        time.sleep(0.02)
    return [each.poll() for each in commands]


def run_both(hosts: Hosts, folder: Path, case: str) -> None:
    """Run both commands undisturbed."""
    codes = wait_for(hosts.start(folder, PATIENCE), PATIENCE)
    if codes != [0, 0]:
        fail(case, folder, f"the undisturbed commands' exit codes are {codes}, expected 0 and 0")


def disturb(hosts: Hosts, folder: Path, case: str) -> float:
    """Disturb a run in the middle of training; return the seconds until its commands have ended."""
    commands, cable = hosts.start(folder, hosts.limit), hosts.cable
    until = time.monotonic() + PATIENCE
    while steps_recorded(folder) < HIT_AT:
        if time.monotonic() > until or any(each.poll() is not None for each in commands):
            fail(case, folder, "the run ended, or did not come so far, before it could happen")
        time.sleep(0.005)
    began = time.monotonic()
    cable.cut(1)
    if case == BLINK:
        time.sleep(BLINK_SECONDS)
        if (done := steps_recorded(folder)) >= STEPS:
            fail(case, folder, f"{done} steps were done when the cable was mended")
        cable.mend()
        if (codes := wait_for(commands, PATIENCE)) != [0, 0]:
            fail(case, folder, f"exit codes {codes}, expected 0 and 0")
        return time.monotonic() - began
    left = [0, 1]
    if case in DEATHS:
        cable.kill_all(dead := DEATHS[case])
        commands[dead].wait()
        left.remove(dead)
    codes = wait_for([commands[host] for host in left], hosts.limit + LATE)
    for host, code in zip(left, codes, strict=True):
        check_end(hosts, folder, case, host, code)
    return time.monotonic() - began


def check_end(hosts: Hosts, folder: Path, case: str, host: int, code: int | None) -> None:
    """Exit unless a host that was left alone ended in time, with its message."""
    if code is None:
        fail(case, folder, f"host {host} still waits after {hosts.limit + LATE:g} s")
    if code == 0:
        fail(case, folder, f"host {host} ended with exit code 0")
    output = said(folder, host)
    if why := message_fault(output, host):
        fail(case, folder, f"host {host} {why}")


def unnamed(cable: Cable, limit: float, work: Path) -> float:
    """Run two hosts that look for each other on the wrong interface; return the seconds it took."""
    folder, began = work / "unnamed", time.monotonic()
    hosts = Hosts(cable, limit, interface_named=False)
    codes = wait_for(hosts.start(folder, limit), limit + PATIENCE)
    for host in range(2):
        check_end(hosts, folder, NO_INTERFACE, host, codes[host])
        if "GLOO_SOCKET_IFNAME" not in said(folder, host):
            fail(NO_INTERFACE, folder, f"host {host} does not name GLOO_SOCKET_IFNAME")
    return time.monotonic() - began


def storm(cable: Cable, limit: float, work: Path) -> list[dict[str, Any]]:
    """Run all cases, one after another."""
    hosts, whole, found = Hosts(cable, limit), work / "whole", []
    run_both(hosts, whole, "nothing")
    print("two hosts trained together", file=sys.stderr, flush=True)
    for case in CASES:
        folder = work / case.replace(" ", "_")
        took = disturb(hosts, folder, case)
        if case != BLINK:
            cable.mend()
            run_both(hosts, folder, f"after {case}")
        check_same(folder, whole)
        print(f"{case}: over after {took:.1f} s, and went on", file=sys.stderr, flush=True)
        found.append({"case": case, "seconds": round(took, 1)})
    took = unnamed(cable, limit, work)
    return [*found, {"case": NO_INTERFACE, "seconds": round(took, 1)}]


def main() -> None:
    """Make the rows, go through the cases, print the report as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--limit", type=float, default=10.0, help="seconds a collective may take in a disturbed run"
    )
    parser.add_argument("--folder", type=Path, help="kept; a temporary one if not given")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="torchprime-chaos-") as temporary, laid() as cable:
        if not isinstance(cable, Cable):
            print(json.dumps({"skipped": cable}))
            return
        work = Path(temporary) if args.folder is None else args.folder.absolute()
        work.mkdir(parents=True, exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = str(work / "cache")
        write_rows(work)
        try:
            cases = storm(cable, args.limit, work)
        finally:  # whatever is left of a case that failed
            for host in range(2):
                cable.kill_all(host)
    print(json.dumps({"limit": args.limit, "cases": cases}, indent=2))


if __name__ == "__main__":
    main()
