"""Samples are read back as they were written; what is no file of samples is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchprime.errors import DataError
from torchprime.evaluation import behaviour
from torchprime.evaluation.behaviour import read_samples


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "step_00000001.jsonl")
    with pytest.raises(DataError, match="step_00000001.jsonl: cannot be read .*not a regular file"):
        read_samples(tmp_path / "step_00000001.jsonl")


def test_a_file_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(behaviour, "MOST_BYTES", 100)
    (tmp_path / "a.jsonl").write_text(" " * 101)
    with pytest.raises(DataError, match="a.jsonl: cannot be read .*more than 100 bytes"):
        read_samples(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").write_text("{}\n")
    with pytest.raises(DataError, match="b.jsonl, line 1: .*expected a sample"):
        read_samples(tmp_path / "b.jsonl")
