"""The run's folder: its command can be given to a shell again."""

from __future__ import annotations

import shlex
import sys

import pytest

from torchprime.training import run_folder


def test_the_command_is_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["train.py", "run_name=a b", "dataset.columns={prompt: $(q)}", "x='y'", "a\nb", "*"]
    monkeypatch.setattr(sys, "argv", given)
    monkeypatch.setattr(sys, "executable", "/opt/python3")
    assert shlex.split(run_folder.command()) == ["python3", *given]
