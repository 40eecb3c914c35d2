"""The recorded command can be typed again; the config is read back; a folder has one lock."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from torchprime.errors import RuntimeSetupError
from torchprime.training.run.folder import FolderLock, command, read_config, write_config


def test_the_recorded_command_is_what_a_shell_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = ["train.py", 'dataset.response_marker="### A:\n"', "run_name=it's $(date)", "a=[1,2]"]
    monkeypatch.setattr(sys, "argv", typed)
    assert shlex.split(command())[1:] == typed
    show = "import sys; print(sys.argv[1:])"
    printed = subprocess.check_output(
        ["sh", "-c", f"'{sys.executable}' -c '{show}' {command()}"], text=True
    )
    assert eval(printed)[1:] == typed


def test_a_config_is_read_back(tmp_path: Path) -> None:
    write_config(tmp_path, {"b": 1, "a": {"c": None}})
    assert read_config(tmp_path) == {"b": 1, "a": {"c": None}}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"- 1\n", "it holds list, not a mapping"),
        (b"", "it holds NoneType"),
        (b"a: [", "while parsing"),
        (b"\xff", "utf-8"),
        (None, "No such file"),
    ],
)
def test_a_config_that_cannot_be_read_is_named(
    tmp_path: Path, content: bytes | None, reason: str
) -> None:
    if content is not None:
        (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(RuntimeSetupError, match=f"config.yaml cannot be read: .*{reason}"):
        read_config(tmp_path)


def test_the_lock_is_taken_once_and_released_at_the_end(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with FolderLock(folder) as lock:
        lock.take_if_there()
        assert not folder.exists(), "a folder that is not there is not made"
        folder.mkdir()
        lock.take_if_there()
        lock.take()
        with FolderLock(folder) as other, pytest.raises(RuntimeSetupError, match="in use"):
            other.take()
    with FolderLock(folder) as other:
        other.take()
