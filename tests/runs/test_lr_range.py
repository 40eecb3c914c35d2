"""`torchprime lr-range` as a user runs it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from torchprime.cli.main import main
from torchprime.metrics.writers import read_metrics


@pytest.fixture
def argv(command: Callable[..., list[str]], tmp_path: Path) -> list[str]:
    return ["lr-range", "--backend", "xla", *command(f"output_dir={tmp_path}", "run_name=test")]


def test_a_run_ends_with_an_interval(
    argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, "--from", "1e-4", "--to", "1", "--steps", "30"]) == 0
    assert "try first: " in capsys.readouterr().out
    folder = tmp_path / "test"
    found = json.loads((folder / "lr_range.json").read_text())
    steps = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]
    assert found["rates"] == [r["lr"] for r in steps]
    assert found["rates"][0] == pytest.approx(1e-4) and found["rates"][-1] == pytest.approx(1)
    assert 1e-4 <= found["low"] <= found["high"] <= 1
    # The tiny model learns at once above 1e-2.
    assert found["lowest"] >= 1e-3
    assert (folder / "lr_range.png").stat().st_size > 1000
    assert not (folder / "export").exists() and not (folder / "checkpoints").exists()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--from", "1", "--to", "0.1"], "--from and --to"),
        (["--from", "0"], "--from and --to"),
        (["-m"], "-m: given with torchprime lr-range"),
    ],
)
def test_wrong_arguments_are_one_message(
    argv: list[str], given: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*argv, *given]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error
