"""A run folder of version 0.1.0, read by today's code: resumed, reported, compared, exported.

tests/assets/run_0_1/README.md says how the folder was made. Numbers that version 0.1.0 wrote are
the reference here.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchprime.cli.main import main as torchprime

KEPT = Path(__file__).parents[1] / "assets" / "run_0_1"
LONGER = ["task.max_steps=9", "task.export_checkpoint_path=export_9"]
ALLOWED = "resume.allow_changes=[task.max_steps]"
# As `torchprime compare` allows between machines, meshes and backends.
RELATIVE = 1e-4
Run = Callable[[list[str]], int]


@pytest.fixture
def old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that a user has beside the base and the rows; it is the current folder."""
    here = tmp_path / "here"
    shutil.copytree(KEPT, here)
    shutil.unpack_archive(KEPT / "checkpoints.tar.xz", here / "run", filter="data")
    monkeypatch.chdir(here)
    return here / "run"


@pytest.fixture
def argv() -> list[str]:
    """The arguments of the command that made the run."""
    command = json.loads((KEPT / "run" / "run.json").read_text())["command"]
    return shlex.split(command)[2:]


def trained(path: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [each for each in records if each.get("kind", "train") == "train"]


def assert_same_steps(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our["batch_hash"] == their["batch_hash"]
        assert our["lr"] == pytest.approx(their["lr"], rel=1e-6)
        assert our["loss"] == pytest.approx(their["loss"], rel=RELATIVE)
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=10 * RELATIVE)


def test_it_trains_on_as_its_own_version_did(
    old: Path, argv: list[str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*argv, *LONGER, ALLOWED]) == 0
    assert "resuming from run/checkpoints/step_00000006" in capsys.readouterr().err
    records = trained(old / "metrics.jsonl")
    assert records[:6] == trained(KEPT / "run" / "metrics.jsonl")
    assert_same_steps(records[6:], trained(KEPT / "next_steps.jsonl"))
    starts = json.loads((old / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 6]


def test_it_resumes_from_its_earlier_checkpoint(old: Path, argv: list[str], run: Run) -> None:
    shutil.rmtree(old / "export")
    assert run([*argv, "resume=3"]) == 0
    assert_same_steps(trained(old / "metrics.jsonl"), trained(KEPT / "run" / "metrics.jsonl"))


def test_a_complete_old_run_is_left_alone(
    old: Path, argv: list[str], run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (old / "metrics.jsonl").read_bytes()
    assert run(argv) == 0
    assert "nothing left to do" in capsys.readouterr().err
    assert (old / "metrics.jsonl").read_bytes() == before


def test_resume_check_finds_no_change(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert torchprime(["resume-check", "run"]) == 0
    said = capsys.readouterr().out
    assert "the run is complete: nothing would be done" in said
    assert "questionable" not in said and "refused" not in said


def test_its_report_is_written_again(old: Path) -> None:
    assert torchprime(["report", "run"]) == 0
    page = (old / "report.md").read_text()
    assert "4.5393" in page and "4.2044" in page  # the held-out losses before and after
    assert "2 + 8 =" in page and (old / "report.html").is_file()


def test_it_is_compared(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["compare", "run", "again=run", "--steps", "6", "--out", str(old), "--figure", "none"]
    code = torchprime(argv)
    assert code == 0, capsys.readouterr()
    found = json.loads((old / "parity.json").read_text())
    assert found["verdict"] == "agree" and found["pairs"][0]["data"]["steps_with_hashes"] == 6


@pytest.mark.parametrize("name", ["step_00000006", "best"])
def test_its_checkpoint_makes_its_export(old: Path, name: str) -> None:
    assert torchprime(["export", f"run/checkpoints/{name}", "--out", "out"]) == 0
    for file in ("model.safetensors", "tokenizer.json"):
        assert Path("out", file).read_bytes() == (old / "export" / file).read_bytes()
    config, was = (
        json.loads((d / "config.json").read_text()) for d in (Path("out"), old / "export")
    )
    assert config == was


def test_its_export_is_verified(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert torchprime(["verify", "run/export"]) == 0, capsys.readouterr()
