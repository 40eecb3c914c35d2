"""The command that a run records can be typed again."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from torchprime.training.run.folder import command


def test_the_recorded_command_is_what_a_shell_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["train.py", 'dataset.response_marker="### A:\n"', "run_name=it's $(date)", "a=[1,2]"]
    monkeypatch.setattr(sys, "argv", typed)
    assert shlex.split(command())[1:] == typed
    show = "import sys; print(sys.argv[1:])"
    printed = subprocess.check_output(
        ["sh", "-c", f"'{sys.executable}' -c '{show}' {command()}"], text=True
    )
    assert eval(printed)[1:] == typed
