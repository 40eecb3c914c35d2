"""Files of a run's folder that are no plain files, or too large, are refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchprime.errors import DataError
from torchprime.report import read
from torchprime.report.read import read_report


def test_a_pipe_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(DataError, match=r"config.yaml: cannot be read .*not a regular file"):
        read_report(tmp_path)


def test_a_file_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read, "MOST_BYTES", 100)
    (tmp_path / "config.yaml").write_text("a: 1\n")
    (tmp_path / "run.json").write_text(" " * 101)
    with pytest.raises(DataError, match=r"run.json: cannot be read .*more than 100 bytes"):
        read_report(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="config.yaml is missing"):
        read_report(tmp_path)
