"""Objects that hosts exchange through torch_xla's rendezvous, which is played here."""

from __future__ import annotations

from typing import Any

import pytest
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr

from torchprime.torch_xla_models.processes import make_processes
from torchprime.training.processes import OneProcess


def test_a_host_alone_needs_no_rendezvous() -> None:
    assert isinstance(make_processes(), OneProcess)


def test_each_of_both_channels_has_its_own_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    met: list[tuple[str, bytes]] = []

    def rendezvous(tag: str, payload: bytes) -> list[bytes]:
        met.append((tag, payload))
        return [payload] * 2

    monkeypatch.setattr(xr, "process_count", lambda: 2)
    monkeypatch.setattr(xr, "process_index", lambda: 1)
    monkeypatch.setattr(xm, "rendezvous", rendezvous)
    processes: Any = make_processes()
    assert (processes.index, processes.count) == (1, 2)
    assert processes.gather({"a": (1, None)}) == [{"a": (1, None)}] * 2
    assert processes.aside.gather(2) == [2, 2] and processes.largest(3) == 3
    assert [tag for tag, _ in met] == [
        "torchprime-objects", "torchprime-objects-aside", "torchprime-objects",
    ]  # fmt: skip
