"""The files of a snapshot: records are on the disk before the checkpoint can get its name."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from torchprime.checkpoint.run.manifest import Manifest
from torchprime.training.run.snapshot import Snapshot

MANIFEST = cast(Manifest, SimpleNamespace(step=3, scores={"eval_loss": 1.5}, metrics={"loss": 2.0}))


class Exporter:
    def __init__(self, done: list[Any]) -> None:
        self.done = done

    def keep(self, writer: Path, **given: Any) -> None:
        self.done.append(("export", writer, given))


class Records:
    def __init__(self, done: list[Any]) -> None:
        self.done = done

    def sync(self) -> None:
        self.done.append("sync")


def test_the_files_of_an_export_come_before_the_records() -> None:
    done: list[Any] = []
    writer: Any = object()
    given: Any = {"exporter": Exporter(done), "writers": [Records(done), Records(done)]}
    Snapshot(MANIFEST, export_weights=True, **given).complete(writer)
    facts = {"step": 3, "metrics": {"loss": 2.0}, "weights": True}
    assert done == [("export", writer, facts), "sync", "sync"]


def test_a_snapshot_can_be_without_them_and_never_changes() -> None:
    snapshot = Snapshot(MANIFEST)
    snapshot.complete(cast(Any, object()))
    assert (snapshot.step, snapshot.scores) == (3, {"eval_loss": 1.5})
    with pytest.raises(dataclasses.FrozenInstanceError):
        snapshot.export_weights = True  # type: ignore[misc]
