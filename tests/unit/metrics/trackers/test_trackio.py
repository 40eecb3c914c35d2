"""Trackio itself: its local store, read back by its own storage class."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchprime.metrics.record import StepRecord
from torchprime.metrics.trackers import trackio as ours
from torchprime.metrics.trackers.tracker import Table, TrackedRun, scalars
from torchprime.metrics.trackers.trackio import Trackio

ANSWERS = Table(["output", "exact"], [["<b>né*", 1.0], ["", None]])


@pytest.fixture
def store(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library's storage in a folder of its own, fixed when it is imported first."""
    place = tmp_path_factory.getbasetemp() / "trackio"
    monkeypatch.setenv("TRACKIO_DIR", str(place))
    monkeypatch.delenv("TRACKIO_SERVER_URL", raising=False)
    monkeypatch.delenv("TRACKIO_SPACE_ID", raising=False)
    module = "trackio.sqlite_storage"
    return pytest.importorskip(module, reason="make test-trackers installs it").SQLiteStorage


def test_the_local_store_and_a_continued_run(
    store: Any, tmp_path: Path, step_record: StepRecord, capsys: pytest.CaptureFixture[str]
) -> None:
    report = tmp_path / "report.md"
    report.write_text("# report")
    run = TrackedRun("first", tmp_path / "run", {"seed": 7}, project="local")
    names = set()
    for first in (0, 2):
        tracker = Trackio(replace(run, first_step=first))
        told = tracker.open()
        names.add(name := run.remembered("trackio")["run"])
        assert told == f"trackio: {name} in the local store; to look: trackio show"
        for step in (first + 1, first + 2):
            tracker.log(step, scalars(replace(step_record, step=step, loss=1 / step)))
        tracker.table(first + 2, ANSWERS)
        tracker.artifact([report])
        tracker.close("finished")
    assert capsys.readouterr().out == "", "the line above says it all"
    assert len(names) == 1 and name.startswith("first-")
    assert [each["name"] for each in store.get_run_records("local")] == [name]
    logs = store.get_logs("local", name)
    losses = [(each["step"], each["train/loss"]) for each in logs if "train/loss" in each]
    assert losses == [(step, pytest.approx(1 / step)) for step in range(1, 5)]
    tables = [each["samples"] for each in logs if "samples" in each]
    assert [each["_value"] for each in tables] == [
        [{"output": "&lt;b>né\\*", "exact": 1.0}, {"output": "", "exact": None}]
    ] * 2
    assert [each["outcome"] for each in logs if "outcome" in each] == ["finished"] * 2
    assert store.get_run_config("local", name)["seed"] == 7


def test_a_space_without_a_login_means_the_local_store(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_SPACE_ID", "me/space")
    monkeypatch.setattr(ours, "get_token", lambda: None)
    tracker = Trackio(TrackedRun("first", tmp_path, {}, project="local"))
    told = tracker.open()
    assert "in the local store instead of me/space (no login; hf auth login)" in told
    tracker.close("failed")
