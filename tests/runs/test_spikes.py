"""Poisoned batches in real runs: skipped or reported, with the same decisions after a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import interrupted
import pytest
from interrupted import ALONE, Killed, assert_same_run

from torchprime.config.entry import run_main
from torchprime.torch_native.train import main as native

POISONED = (7, 8)  # 1-based; logged are steps 4, 8 and 12, checkpoints come after 3, 6, 9 and 12
SPIKES = ("task.spike.window=4", "task.spike.deviations=5", "logging_steps=4")


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted.poison(monkeypatch, POISONED)


def spikes(folder: Path) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "spike"]


def check(
    start: Callable[[list[str]], int],
    arguments: Callable[[Path], list[str]],
    tmp_path: Path,
    killed_after: Callable[[int], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert start(arguments(whole)) == 0
    found = spikes(whole)
    assert [line["step"] for line in found] == list(POISONED)
    assert all(line["skipped"] and line["grad_norm"] > line["grad_norm_limit"] for line in found)
    assert len({line["batch_hash"] for line in found}) == 2
    told = capsys.readouterr().err
    assert told.count("its update was skipped") == 2 and "step 7/12  spike: loss" in told
    assert "2 updates were skipped as spikes: steps 7, 8" in (whole / "report.md").read_text()
    # After step 7, which is in no logged step yet; resumes from 6, and again from 9.
    for step in (7, 10):
        killed_after(step)
        with pytest.raises(Killed):
            start(arguments(cut))
    assert start(arguments(cut)) == 0
    assert spikes(cut) == found
    assert_same_run(cut, whole)


def test_native_skips_them(
    command: Callable[..., list[str]], rows: tuple[Path, Path], tmp_path: Path,
    killed_after: Callable[[int], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def arguments(folder: Path) -> list[str]:
        skip = "task.spike.action=skip"
        return command(*interrupted.overrides(folder, rows[1]), *ALONE, *SPIKES, skip)

    check(lambda argv: run_main(native, argv), arguments, tmp_path, killed_after, capsys)


@pytest.mark.slow
def test_xla_skips_them_on_four_devices(
    run: Callable[[list[str]], int], command: Callable[..., list[str]], rows: tuple[Path, Path],
    tmp_path: Path, killed_after: Callable[[int], None], capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def arguments(folder: Path) -> list[str]:
        skip = "task.spike.action=skip"
        return command(*interrupted.overrides(folder, rows[1]), *SPIKES, skip)

    check(run, arguments, tmp_path, killed_after, capsys)


def test_warn_makes_their_updates(
    command: Callable[..., list[str]], rows: tuple[Path, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    folder = tmp_path / "run"
    argv = command(*interrupted.overrides(folder, rows[1]), *ALONE, *SPIKES)
    assert run_main(native, argv) == 0
    found = spikes(folder)
    assert found[0]["step"] == POISONED[0] and not any(line["skipped"] for line in found)
    assert "its update was made" in capsys.readouterr().err
    assert "spikes and made: steps 7" in (folder / "report.md").read_text()
