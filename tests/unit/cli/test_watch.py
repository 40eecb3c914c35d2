"""The command `watch`: one frame, lines, a drawing on a terminal, and the ways out of it."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from torchprime.cli import watch
from torchprime.cli.main import main

ASSET = Path(__file__).parents[2] / "assets" / "run_0_1" / "run"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 6 steps without its report: it counts as not finished."""
    return Path(shutil.copytree(ASSET, tmp_path / "run"))


def interrupting(count: int) -> Callable[[float], None]:
    """A clock that waits so many times, then is interrupted as by Ctrl-C."""
    left = iter(range(count))

    def sleep(seconds: float) -> None:
        if next(left, None) is None:
            raise KeyboardInterrupt

    return sleep


def test_once_prints_a_frame(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", str(folder), "--once"]) == 0
    out = capsys.readouterr().out
    assert "6/6 100.0%" in out and "loss" in out and "evaluation" in out and "\x1b" not in out


def test_once_without_a_run_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["watch", str(tmp_path / "nothing"), "--once"]) == 2
    told = capsys.readouterr()
    assert told.out == "" and "holds no run yet, expected <output_dir>/<run_name>" in told.err


def test_lines_without_a_terminal_until_the_run_has_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def finish(seconds: float) -> None:
        (folder / "report.md").write_text("# report")

    monkeypatch.setattr(watch.time, "sleep", finish)
    assert main(["watch", str(folder)]) == 0
    told = capsys.readouterr()
    steps = [line.split()[1] for line in told.out.splitlines() if "eval_loss" not in line]
    assert steps == [f"{step}/6" for step in range(1, 7)]
    assert told.err == f"{folder} has finished\n"


def test_control_c_leaves_quietly_also_before_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(watch.time, "sleep", interrupting(3))
    assert main(["watch", str(tmp_path / "later")]) == 0
    told = capsys.readouterr()
    assert told.out == "" and told.err == f"waiting for records of {tmp_path / 'later'}\n"


@pytest.mark.parametrize("given", ["0", "x", "1e9"])
def test_a_wrong_interval_is_refused(given: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["watch", "run", "--every", given]) == 2
    assert "--every" in capsys.readouterr().err


def test_it_draws_on_a_terminal_and_ends_with_the_run(folder: Path, repo_dir: Path) -> None:
    """A real terminal of 40 cells without colours."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)
    command = [sys.executable, "-m", "torchprime.cli.main", "watch", str(folder), "--every", "0.1"]
    variables = {**os.environ, "NO_COLOR": "1", "TERM": "xterm", "COLUMNS": "40", "LINES": "60"}
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, env=variables, cwd=repo_dir
    )
    os.close(theirs)
    text, until = b"", time.monotonic() + 60
    while time.monotonic() < until:
        try:
            text += os.read(ours, 65536)
        except BlockingIOError:
            time.sleep(0.05)
        except OSError:  # the other end is closed, and all that it wrote was read
            break
        if b"6/6" in text:
            (folder / "report.md").write_text("# report")
    assert process.wait(30) == 0
    shown = text.decode()
    assert "6/6 100.0%" in shown and "\x1b[?25h" in shown, "the cursor is visible again"
    assert "\x1b[3" not in shown, "no colour was asked for"
