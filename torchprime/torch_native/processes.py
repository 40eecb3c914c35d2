"""The processes of a run on torch.distributed, which exchange objects on the hosts by gloo."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist

from torchprime.torch_native.runtime import timeout_seconds
from torchprime.training.processes import OneProcess, Processes


class NativeProcesses(Processes):
    """The processes of one torchrun, over a gloo group of their own: also on GPUs an exchange of
    objects neither uses the device nor waits for it. All processes have to make it."""

    def __init__(self, aside: Processes | None = None) -> None:
        super().__init__(dist.get_rank(), dist.get_world_size(), aside)
        limit = timedelta(seconds=timeout_seconds())
        self._group = dist.new_group(backend="gloo", timeout=limit)

    def gather(self, value: Any) -> list[Any]:
        """Return on every process the values of all.

        The call is not watched: gloo raises by itself, and listening for those messages
        (training/processes.py) must not end this process.
        """
        gathered: list[Any] = [None] * self.count
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered


def make_processes() -> Processes:
    """Return the processes of the group that was joined; all of them call it."""
    if dist.get_world_size() == 1:
        return OneProcess()
    return NativeProcesses(aside=NativeProcesses())
