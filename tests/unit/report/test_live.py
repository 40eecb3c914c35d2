"""A run's folder read while the run writes it: torn lines, resumed runs, files not there yet."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from torchprime.errors import DataError
from torchprime.metrics.record import CheckpointRecord, EvalRecord, StepRecord, TimeRecord, to_json
from torchprime.report.live import REPORT, LiveRun
from torchprime.report.write import MARKDOWN

EVAL = EvalRecord(step=2, eval_loss=1.5, eval_supervised_tokens=1500, seconds=2.0)


def write_facts(folder: Path, *starts: int) -> None:
    facts = {
        "plan": {"total_steps": 8},
        "starts": [{"step": step} for step in starts],
        "device": {"kind": "CPU", "count": 4},
        "backend": "torch_xla",
        "model": {"pretrained": "/models/tiny"},
    }
    (folder / "run.json").write_text(json.dumps(facts))


def lines(record: StepRecord, *steps: int) -> str:
    return "".join(to_json(replace(record, step=s, loss=10 - s)) + "\n" for s in steps)


def test_it_waits_for_a_run_and_follows_it(tmp_path: Path, step_record: StepRecord) -> None:
    folder = tmp_path / "run"
    run = LiveRun(folder)
    assert run.update() == [] and not run.is_there
    folder.mkdir()
    write_facts(folder, 0)
    assert run.update() == [] and run.is_there and run.total == 8
    assert run.about == "tiny, torch_xla on 4 x CPU"
    metrics = folder / "metrics.jsonl"
    metrics.write_text(lines(step_record, 1, 2))
    assert [record["step"] for record in run.update()] == [1, 2]
    assert run.update() == []
    with metrics.open("a") as file:
        file.write(to_json(EVAL) + "\n")
        file.write(to_json(CheckpointRecord(2, "step_00000002", 7, 0.1, 0.2)) + "\n")
    assert [record["kind"] for record in run.update()] == ["eval", "checkpoint"]
    assert run.losses == [(1, 9.0), (2, 8.0)] and run.evaluations == [EVAL]
    assert run.checkpoint is not None and run.checkpoint["name"] == "step_00000002"
    assert run.seconds_per_step() == 1.0


def test_a_line_that_is_being_written_waits(tmp_path: Path, step_record: StepRecord) -> None:
    run, metrics = LiveRun(tmp_path), tmp_path / "metrics.jsonl"
    text = lines(step_record, 1, 2)
    for end in range(len(text) + 1):
        with metrics.open("a") as file:
            file.write(text[end - 1 : end] if end else "")
        run.update()
        assert [step for step, _ in run.losses] == list(range(1, text[:end].count("\n") + 1))


@pytest.mark.parametrize("renamed", [True, False])
def test_a_resumed_run_is_read_from_its_beginning(
    renamed: bool, tmp_path: Path, step_record: StepRecord
) -> None:
    """The records after the checkpoint are cut, then written again."""
    run, metrics = LiveRun(tmp_path), tmp_path / "metrics.jsonl"
    write_facts(tmp_path, 0)
    metrics.write_text(lines(step_record, 1, 2, 3, 4))
    run.update()
    again = lines(step_record, 1, 2) + lines(replace(step_record, lr=0.5), 3, 4, 5)
    if renamed:
        (tmp_path / "new").write_text(again)
        os.replace(tmp_path / "new", metrics)
    else:
        metrics.write_text(again)
    write_facts(tmp_path, 0, 2)
    os.utime(tmp_path / "run.json", (1, 1))
    assert len(run.update()) == 5
    assert [step for step, _ in run.losses] == [1, 2, 3, 4, 5]
    assert run.recent[-1].lr == 0.5 and run.starts == [0, 2]


def test_a_run_has_finished_when_its_report_is_the_newest(
    tmp_path: Path, step_record: StepRecord
) -> None:
    assert REPORT == MARKDOWN
    write_facts(tmp_path, 0)
    (tmp_path / "metrics.jsonl").write_text(lines(step_record, 8))
    run = LiveRun(tmp_path)
    run.update()
    assert not run.finished
    (tmp_path / "report.md").write_text("# report")
    run.update()
    assert run.finished
    os.utime(tmp_path / "report.md", (1, 1))  # of an earlier start
    run.update()
    assert not run.finished


def test_times_are_those_of_the_last_line(tmp_path: Path) -> None:
    run, path = LiveRun(tmp_path), tmp_path / "times.jsonl"
    for wall in (10.0, 20.0):
        with path.open("a") as file:
            file.write(to_json(TimeRecord(1, 0, 0.0, wall, {"data": 1.0})) + "\n")
        run.update()
        assert run.times is not None and run.times.wall_seconds == wall


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metrics.jsonl", "no json\n"),
        ("metrics.jsonl", '{"kind": "train", "step": 1}\n'),
        ("metrics.jsonl", '{"step": 1}\n'),
        ("run.json", "no json"),
        ("run.json", '{"plan": {}}'),
        ("run.json", "[]"),
        ("times.jsonl", '{"kind": "time"}\n'),
    ],
)
def test_a_damaged_file_is_named(name: str, content: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=name):
        LiveRun(tmp_path).update()


def test_a_pipe_is_not_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(DataError, match="not a regular file"):
        LiveRun(tmp_path).update()
