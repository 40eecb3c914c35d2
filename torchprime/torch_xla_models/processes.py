"""The processes of a run on torch_xla, one per host of a slice."""

from __future__ import annotations

import pickle
from typing import Any

import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from torchprime.training.processes import OneProcess, Processes


class XlaProcesses(Processes):
    """The processes of one slice, which meet under a tag of torch_xla's rendezvous."""

    def __init__(self, tag: str, aside: Processes | None = None) -> None:
        super().__init__(xr.process_index(), xr.process_count(), aside)
        self._tag = tag

    def gather(self, value: Any) -> list[Any]:
        """Return on every process the values of all."""
        return [pickle.loads(each) for each in xm.rendezvous(self._tag, pickle.dumps(value))]


def make_processes() -> Processes:
    """Return the processes that the runtime has found."""
    if xr.process_count() == 1:
        return OneProcess()
    return XlaProcesses("torchprime-objects", XlaProcesses("torchprime-objects-aside"))
