"""Trackers around whole runs: what they get, and that their faults stay theirs."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import interrupted
import pytest

from torchprime.config.entry import run_main
from torchprime.metrics.trackers import choose
from torchprime.metrics.trackers.tracker import Outcome, Table, TrackedRun
from torchprime.torch_native.train import main as native
from torchprime.training.hooks.checkpoint import CheckpointHook

Command = Callable[..., list[str]]
ONE = ("ici_mesh.fsdp=1", "ici_mesh.tensor=1")
SHORT = ("task.max_steps=4", "checkpoint.every_steps=2", "eval.every_steps=2")
ANSWERS = (
    "eval.generate.max_examples=3",
    "eval.generate.max_new_tokens=4",
    "eval.generate.batch_size=4",
    "eval.graders=[{name: exact, kind: exact_match}]",
)


class Double:
    """A tracker in the place of wandb that notes what it gets, or raises in a method."""

    name = "wandb"
    made: ClassVar[list[Double]] = []
    broken = ""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.logged: dict[int, dict[str, float]] = {}
        self.tables: dict[int, Table] = {}
        self.files: list[str] = []
        self.outcome: Outcome | None = None
        self.made.append(self)

    def open(self) -> str:
        self._break("open")
        return "wandb: here"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._break("log")
        self.logged.setdefault(step, {}).update(values)

    def table(self, step: int, table: Table) -> None:
        self.tables[step] = table

    def artifact(self, files: Sequence[Path]) -> None:
        self.files = [path.name for path in files if path.is_file()]

    def close(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def _break(self, method: str) -> None:
        if method == self.broken:
            raise ConnectionError("the server is away")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> type[Double]:
    """The class in the place of wandb's, which counts as installed."""
    monkeypatch.setitem(choose.TRACKERS, "wandb", Double)
    monkeypatch.setattr(choose, "_is_installed", lambda name: True)
    monkeypatch.setattr(Double, "made", [])
    return Double


@pytest.fixture
def argv(command: Command, rows: tuple[Path, Path], tmp_path: Path) -> list[str]:
    """A run of 4 steps with two evaluations after the first, and an export."""
    given = interrupted.overrides(tmp_path / "run", rows[1])
    return command(*given, *ONE, *SHORT, "metrics.trackers=[wandb]")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_tracker_gets_metrics_config_answers_and_report(
    double: type[Double], argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(native, [*argv, *ANSWERS]) == 0
    (tracker,) = double.made
    assert tracker.run.name == "run" and tracker.run.config["metrics"]["trackers"] == ["wandb"]
    for record in records(tmp_path / "run"):
        kind = record["kind"]
        for key in ("loss", "eval_loss", "bytes"):
            if key in record:
                name = f"{kind}/{key.removeprefix('eval_')}"
                assert tracker.logged[record["step"]][name] == record[key]
    assert sorted(tracker.tables) == [0, 2, 4]
    table = tracker.tables[4]
    assert table.columns == [
        *("row_id", "prompt", "output", "reference", "stopped", "tokens", "exact")
    ]
    assert len(table.rows) == 3 and table.rows[0][1].startswith("say ")  # type: ignore[union-attr]
    assert tracker.files == ["report.md", "report.html", "run.json", "certificate.json"]
    assert tracker.outcome == "finished"
    assert "wandb: here" in capsys.readouterr().err
    assert not (tmp_path / "run" / "tensorboard").exists(), "it was not named"


def test_a_tracker_that_fails_does_not_end_the_run(
    double: type[Double], argv: list[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(double, "broken", "log")
    assert run_main(native, argv) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if "server is away" in line]
    assert told == [
        "wandb: ConnectionError: the server is away. The run continues without it; metrics.jsonl "
        "has every record"
    ]
    steps = [each["step"] for each in records(tmp_path / "run") if each["kind"] == "train"]
    assert steps == [1, 2, 3, 4]


def test_a_run_that_fails_is_told_as_failed(
    double: type[Double], argv: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: CheckpointHook, done: int, last: bool) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(CheckpointHook, "after_step", fails)
    with pytest.raises(RuntimeError, match="a bug"):
        run_main(native, argv)
    (tracker,) = double.made
    assert tracker.outcome == "failed" and 1 in tracker.logged


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("[tensorbord]", "metrics.trackers[0]: given 'tensorbord', expected one of tensorboard, "),
        ("[wandb,wandb]", "expected each tracker once (wandb is listed twice)"),
        ("wandb", "metrics.trackers: given 'wandb', expected a list. Write metrics.trackers="),
    ],
)
def test_a_wrong_tracker_is_one_message(
    given: str, told: str, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(native, [*argv[:-1], f"metrics.trackers={given}"]) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert told in error


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_missing_library_is_one_message_before_weights_are_read(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_main(native, argv) == 2
    (error,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "pip install 'torchprime[wandb]'" in error
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_is_the_same_run_there(
    argv: list[str], tmp_path: Path, killed_after: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With the real wandb, offline: both starts write files of one run id."""
    pytest.importorskip("wandb", reason="make test-trackers installs it")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    killed_after(3)
    with pytest.raises(interrupted.Killed):
        run_main(native, [*argv, "metrics.offline=true"])
    known = (tmp_path / "run" / "trackers" / "wandb.json").read_text()
    assert run_main(native, [*argv, "metrics.offline=true"]) == 0
    assert (tmp_path / "run" / "trackers" / "wandb.json").read_text() == known
    files = (tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/*.wandb")
    assert [file.name for file in files] == [f"run-{json.loads(known)['id']}.wandb"] * 2
