"""Faults around a run: damaged checkpoints, full disks, a second process, a wrong clock.

Each fault gives one message and loses nothing: once it is repaired, the same command ends as if it
had not happened.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timedelta, tzinfo
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from interrupted import STEPS, assert_same_run, overrides, records
from read_only import make_read_only

from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.manifest import read_manifest
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.training import start
from torchprime.training.hooks.checkpoint import CheckpointHook
from torchprime.training.run import facts
from torchprime.training.run.facts import RunFile, run_facts

Run = Callable[[list[str]], int]
Command = Callable[..., list[str]]
Printed = pytest.CaptureFixture[str]
SHARD = "__0_0.distcp"


@pytest.fixture
def no_export_yet(
    whole: Path, command: Command, rows: tuple[Path, Path], tmp_path: Path
) -> tuple[Path, list[str]]:
    """A run killed before its export, and its command."""
    folder = tmp_path / "run"
    shutil.copytree(whole, folder)
    shutil.rmtree(folder / "export")
    return folder, command(*overrides(folder, rows[1]))


@pytest.fixture
def before_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], object]], None]:
    """Lets something happen once, when so many steps are done."""

    def arm(step: int, happen: Callable[[], object]) -> None:
        original, pending = CheckpointHook.before_step, [happen]

        def before(self: CheckpointHook, done: int) -> None:
            original(self, done)
            if done == step and pending:
                pending.pop()()

        monkeypatch.setattr(CheckpointHook, "before_step", before)

    return arm


# Damaged checkpoints ------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize(
    ("damage", "file", "said"),
    [
        (Path.unlink, SHARD, f"{SHARD} is missing"),
        (Path.unlink, "manifest.json", "manifest.json"),
        (truncate, SHARD, f"{SHARD} is damaged: it has "),
    ],
    ids=["missing shard", "missing manifest", "truncated shard"],
)
def test_the_one_before_is_taken(
    damage: Callable[[Path], None], file: str, said: str, whole: Path, run: Run,
    no_export_yet: tuple[Path, list[str]], capsys: Printed,
) -> None:  # fmt: skip
    folder, argv = no_export_yet
    damage(folder / "checkpoints" / "step_00000012" / file)
    assert run(argv) == 0
    printed = capsys.readouterr().err
    [skipped] = [line for line in printed.splitlines() if "is skipped" in line]
    assert "step_00000012" in skipped and said in skipped
    assert f"resuming from {folder}/checkpoints/step_00000009" in printed
    assert_same_run(folder, whole)
    assert (folder / "checkpoints" / "set_aside_1_step_00000012").is_dir(), "it may be mended"


def test_if_none_is_whole_nothing_is_touched(
    whole: Path, run: Run, no_export_yet: tuple[Path, list[str]], capsys: Printed
) -> None:
    """To begin again at step one would cost days, and write over what may be mended."""
    folder, argv = no_export_yet
    checkpoints = sorted((folder / "checkpoints").glob("step_*"))
    for index, checkpoint in enumerate(checkpoints):
        (truncate if index % 2 else Path.unlink)(checkpoint / SHARD)
    before = sorted(p.relative_to(folder) for p in folder.rglob("*"))
    assert run(argv) == 2
    printed = capsys.readouterr().err
    assert printed.count("is skipped") == len(checkpoints) == 4
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert str(folder / "checkpoints") in error and "none of the 4 checkpoints" in error
    assert sorted(p.relative_to(folder) for p in folder.rglob("*")) == before
    shutil.copy(whole / "checkpoints" / "step_00000006" / SHARD, checkpoints[1] / SHARD)
    assert run(argv) == 0, "one mended by a copy is enough"
    assert_same_run(folder, whole)


# Disks --------------------------------------------------------------------------------------------


def test_a_full_disk_costs_one_checkpoint(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path,
    small_disk: Path, before_step: Callable, capsys: Printed,
) -> None:  # fmt: skip
    """Between step 4 and 8 nothing fits on it."""
    folder = tmp_path / "run"
    # Written beside the loop, it could be late enough to find room again.
    there = (f"checkpoint.folder={small_disk}", "checkpoint.asynchronous=false")
    argv = command(*overrides(folder, rows[1]), *there)
    ballast = small_disk / "ballast"

    def fill() -> None:
        assert Catalog(open_storage(small_disk / "run")).steps() == [3]
        left = shutil.disk_usage(small_disk).free
        ballast.write_bytes(bytes(left - 20_000))

    before_step(4, fill)
    before_step(8, ballast.unlink)
    assert run(argv) == 0
    printed = capsys.readouterr().err
    [told] = [line for line in printed.splitlines() if "NOT written" in line]
    assert "checkpoint of step 6 NOT written" in told and "no space (0.00 GB left)" in told
    assert "checkpoint.keep_last" in told and str(small_disk) in told
    catalog = Catalog(open_storage(small_disk / "run"))
    assert catalog.steps() == [3, 9, 12]
    assert not [name for name in catalog.storage.names() if name.startswith(".")]
    shutil.copytree(small_disk / "run", folder / "checkpoints")
    assert_same_run(folder, whole)


# TensorBoard's thread ends with a traceback of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_without_room_for_records_ends_the_run_and_not_its_past(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], small_disk: Path,
    before_step: Callable, capsys: Printed,
) -> None:  # fmt: skip
    folder = small_disk / "run"
    # A checkpoint written meanwhile could fail, and leave its room to the records.
    argv = command(*overrides(folder, rows[1]), "checkpoint.asynchronous=false")
    ballast = small_disk / "ballast"

    def fill() -> None:
        with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    before_step(4, fill)
    assert run(argv) == 2
    printed = capsys.readouterr().err
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "metrics.jsonl" in error and "No space left" in error
    ballast.unlink()
    assert run(argv) == 0
    assert "step_00000003" in capsys.readouterr().err
    assert_same_run(folder, whole)


def test_a_disk_without_room_for_run_json_is_told(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], small_disk: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: Printed,
) -> None:  # fmt: skip
    """It was full before any step: the same command begins the run anew."""
    folder, ballast = small_disk / "run", small_disk / "ballast"
    argv = command(*overrides(folder, rows[1]))

    def facts_on_a_full_disk(*given: Any) -> RunFile:
        with pytest.raises(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        return run_facts(*given)

    with monkeypatch.context() as patch:
        patch.setattr(start, "run_facts", facts_on_a_full_disk)
        assert run(argv) == 2
    printed = capsys.readouterr().err
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert str(folder) in error and "No space left" in error and "Free some space" in error
    assert "Traceback" not in printed
    ballast.unlink()
    assert run(argv) == 0
    assert_same_run(folder, whole)


def test_a_disk_without_room_for_prepared_data_is_told(
    run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path, small_disk: Path,
    capsys: Printed,
) -> None:  # fmt: skip
    """The writer is a library's, which names no file."""
    with pytest.raises(OSError), (small_disk / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    place = f"dataset.prepared_dir={small_disk}"
    assert run(command(*overrides(tmp_path / "run", rows[1]), place)) == 2
    printed = capsys.readouterr().err
    [error] = [line for line in printed.splitlines() if line.startswith("error: ")]
    assert "No space left" in error and "Free some space" in error and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_a_read_only_place_is_told_before_anything_is_done(
    run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path, small_disk: Path,
    capsys: Printed,
) -> None:  # fmt: skip
    make_read_only(small_disk)
    folder = tmp_path / "run"
    argv = command(*overrides(folder, rows[1]), f"checkpoint.folder={small_disk}/kept")
    assert run(argv) == 2
    [error] = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert "checkpoint.folder" in error and f"{small_disk}/kept/run" in error
    assert not folder.exists()


def test_a_place_that_becomes_read_only_keeps_what_is_there(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path,
    small_disk: Path, before_step: Callable, capsys: Printed,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    argv = command(*overrides(folder, rows[1]), f"checkpoint.folder={small_disk}")
    before_step(8, lambda: make_read_only(small_disk))
    assert run(argv) == 2, "the last checkpoint is not there"
    printed = capsys.readouterr().err
    assert "checkpoint of step 9 NOT written: " in printed and "right to write there" in printed
    assert "error: the last checkpoint could not be written" in printed
    catalog = Catalog(open_storage(small_disk / "run"))
    assert catalog.steps() == [3, 6] and catalog.newest_whole(print) == "step_00000006"
    for kind in ("train", "eval"):
        assert records(folder, kind) == records(whole, kind), "training itself went on"


def test_a_kill_before_the_first_file_leaves_no_run(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path
) -> None:
    """The folder, its lock and a file without its name: what a kill there leaves behind."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (".lock", ".config.yaml.tmp"):
        (folder / name).write_text("{")
    assert run(command(*overrides(folder, rows[1]))) == 0
    assert_same_run(folder, whole)


# A second process, the clock ----------------------------------------------------------------------


def test_a_second_process_is_refused_and_the_first_goes_on(
    whole: Path, run: Run, command: Command, rows: tuple[Path, Path], tmp_path: Path,
    before_step: Callable, repo_dir: Path,
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    argv = command(*overrides(folder, rows[1]))
    entry = str(repo_dir / "torchprime" / "torch_xla_models" / "train.py")
    ended: list[subprocess.CompletedProcess[str]] = []

    def times() -> dict[Path, int]:
        """Without TensorBoard's, which are written by a thread of the first."""
        files = [path for path in folder.rglob("*") if "tensorboard" not in path.parts]
        return {path: path.stat().st_mtime_ns for path in files}

    def second() -> None:
        latest = folder / "checkpoints" / "latest"
        while not latest.exists():  # a thread of the first writes the checkpoint of step 3
            time.sleep(0.02)
        before = times()
        command_line = [sys.executable, entry, *argv]
        ended.append(subprocess.run(command_line, capture_output=True, text=True))
        assert times() == before

    before_step(5, second)
    assert run(argv) == 0
    assert ended[0].returncode == 2, ended[0].stderr
    [error] = [x for x in ended[0].stderr.splitlines() if x.startswith("error: ")]
    assert f"{folder} is in use by process {os.getpid()} on " in error and "run_name=" in error
    assert_same_run(folder, whole)


def test_a_clock_that_goes_backwards_changes_nothing(
    whole: Path, run: Run, cut_short: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at it says a day less, in the run's records and in its files' times."""
    days = count()

    class Backwards(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:
            return datetime(2030, 1, 1, tzinfo=tz) - timedelta(days=next(days))

    monkeypatch.setattr(facts, "datetime", Backwards)
    monkeypatch.setattr("time.time", lambda: 2e9 - 86400.0 * next(days))
    folder, argv = cut_short(8)
    storage = open_storage(folder / "checkpoints")
    for step in (3, 6):
        for path in (folder / "checkpoints" / Catalog.name_of(step)).rglob("*"):
            os.utime(path, (2e9 - step, 2e9 - step))
    assert run(argv) == 0
    assert_same_run(folder, whole)
    created = [read_manifest(storage, Catalog.name_of(s)).created for s in (3, 6, 9, STEPS)]
    assert created == sorted(created, reverse=True) and len(set(created)) == 4
    assert Catalog(storage).pointed("latest") == Catalog.name_of(STEPS)
