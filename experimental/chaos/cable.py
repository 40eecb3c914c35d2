"""Two hosts on one machine: two network namespaces, joined by a pair of virtual interfaces."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CLONE_NEWNET = 0x40000000


class Cable:
    """The cable between the two hosts, which are numbered 0 and 1."""

    def __init__(self) -> None:
        self.names = [f"tp{os.getpid()}{end}" for end in "ab"]
        self.addresses = ["10.77.0.1", "10.77.0.2"]

    def lay(self) -> str | None:
        """Make both hosts and connect them; return the reason if this machine does not allow it."""
        first, second = self.names
        commands = [
            *(f"netns add {name}" for name in self.names),
            f"link add {first} netns {first} type veth peer name {second} netns {second}",
        ]
        for name, address in zip(self.names, self.addresses, strict=True):
            commands += [
                f"-n {name} address add {address}/24 dev {name}",
                f"-n {name} link set lo up",
                f"-n {name} link set {name} up",
            ]
        try:
            for each in commands:
                subprocess.run(["ip", *each.split()], check=True, capture_output=True, text=True)
        except FileNotFoundError:
            return "the command ip (iproute2) is not installed"
        except subprocess.CalledProcessError as error:
            self.take_away()
            return f"ip {' '.join(error.cmd[1:])}: {error.stderr.strip()}"
        return None

    def cut(self, host: int) -> None:
        """Unplug the cable at a host. Connections stay open, and nothing arrives any more."""
        self._set(host, "down")

    def mend(self) -> None:
        """Plug in both ends."""
        for host in range(2):
            self._set(host, "up")

    def _set(self, host: int, state: str) -> None:
        name = self.names[host]
        subprocess.run(["ip", "-n", name, "link", "set", name, state], check=True)

    def enter(self, host: int) -> None:
        """Move this process to a host."""
        with open(f"/run/netns/{self.names[host]}") as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")

    def command(self, host: int) -> list[str]:
        """Return the words that start a command on a host."""
        return ["ip", "netns", "exec", self.names[host]]

    def kill_all(self, host: int) -> None:
        """Kill every process of a host."""
        found = ["ip", "netns", "pids", self.names[host]]
        told = subprocess.run(found, check=True, capture_output=True, text=True)
        for process in told.stdout.split():
            with suppress(ProcessLookupError):
                os.kill(int(process), signal.SIGKILL)

    def take_away(self) -> None:
        """Remove both hosts with all that is connected to them."""
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@contextmanager
def laid() -> Iterator[Cable | str]:
    """Yield a cable, or the reason why this machine can have none."""
    cable = Cable()
    if (why := cable.lay()) is not None:
        yield why
        return
    try:
        yield cable
    finally:
        cable.take_away()
