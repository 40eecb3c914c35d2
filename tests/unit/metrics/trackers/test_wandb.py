"""Weights & Biases itself, offline: its file is read back by its own protobuf schema."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchprime.metrics.record import StepRecord
from torchprime.metrics.trackers.tracker import Table, TrackedRun, scalars
from torchprime.metrics.trackers.wandb import Wandb

wandb = pytest.importorskip("wandb", reason="make test-trackers installs it")

ANSWERS = Table(["output", "exact"], [["<b>né", 1.0], ["", None]])


@pytest.fixture(autouse=True)
def no_login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nobody has logged in."""
    for name in ("API_KEY", "MODE", "BASE_URL", "ENTITY"):
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    wandb.teardown()


def messages(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB."""
    data, at, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = wandb.proto.wandb_internal_pb2.Record()
            message.ParseFromString(whole)
            yield message
            whole = b""


def history(found: list[Any]) -> list[dict[str, Any]]:
    rows = [m.history.item for m in found if m.WhichOneof("record_type") == "history"]
    return [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r} for r in rows]


def test_offline_without_a_login_and_continued(tmp_path: Path, step_record: StepRecord) -> None:
    report = tmp_path / "report.md"
    report.write_text("# report")
    folder = tmp_path / "run"
    ids = []
    for first in (0, 2):
        run = TrackedRun("first", folder, {"seed": 7, "model": {"a": None}}, first_step=first)
        tracker = Wandb(run)
        told = tracker.open()
        assert told.startswith("wandb: offline (no login; wandb login). To send it: wandb sync ")
        for step in (first + 1, first + 2):
            tracker.log(step, scalars(replace(step_record, step=step, loss=1 / step)))
        tracker.log(first + 2, {"eval/loss": math.nan})
        tracker.table(first + 2, ANSWERS)
        tracker.artifact([report])
        tracker.close("finished")
        wandb.teardown()  # as at a process' exit: its service has then written everything
        ids.append(run.remembered("wandb")["id"])
    assert ids[0] == ids[1], "the second start continues the run of the first"
    files = sorted((folder / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    assert {file.stem for file in files} == {f"run-{ids[0]}"} and len(files) == 2
    for first, found in zip((0, 2), (list(messages(file)) for file in files), strict=True):
        rows = history(found)
        losses = [(row["step"], row["train/loss"]) for row in rows if "train/loss" in row]
        assert losses == [(step, 1 / step) for step in (first + 1, first + 2)]
        assert any(math.isnan(row.get("eval/loss", 0)) for row in rows)
        (start,) = [m.run for m in found if m.WhichOneof("record_type") == "run"]
        assert (start.run_id, start.project, start.display_name) == (ids[0], "torchprime", "first")
        config = {item.key: json.loads(item.value_json) for item in start.config.update}
        assert (config["seed"], config["model"]) == (7, {"a": None})
        artifacts = [m.artifact for m in found if m.WhichOneof("record_type") == "artifact"]
        kept = {each.path for artifact in artifacts for each in artifact.manifest.contents}
        assert kept == {"samples.table.json", "report.md"}
        axes = {m.metric.glob_name: m.metric.step_metric for m in found if m.HasField("metric")}
        assert axes["*"] == "step", "the x-axis is the run's step, also after a resume"
        assert [m.exit.exit_code for m in found if m.HasField("exit")] == [0]
    (table,) = (files[0].parent / "files" / "media" / "table").glob("samples_*.table.json")
    shown = json.loads(table.read_text())
    assert (shown["columns"], shown["data"]) == (ANSWERS.columns, ANSWERS.rows)


@pytest.mark.slow
def test_a_server_that_is_not_there_means_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3")
    wandb.teardown()
    tracker = Wandb(TrackedRun("first", tmp_path, {}, finish_seconds=2.0))
    assert tracker.open().startswith("wandb: offline (")
    tracker.log(1, {"train/loss": 1.0})
    tracker.close("finished")
