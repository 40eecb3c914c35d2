"""A file given as a noise floor that is no plain file, or too large, is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from torchprime.compare import noise_floor
from torchprime.compare.noise_floor import read_floor
from torchprime.errors import DataError


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "floor.json")
    with pytest.raises(DataError, match="floor.json cannot be read .it is not a regular file"):
        read_floor(tmp_path / "floor.json")


def test_a_file_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(noise_floor, "MOST_BYTES", 100)
    (tmp_path / "floor.json").write_text(" " * 101)
    with pytest.raises(DataError, match="floor.json cannot be read .it has more than 100 bytes"):
        read_floor(tmp_path / "floor.json")
    (tmp_path / "floor.json").write_text("{}")
    with pytest.raises(DataError, match="floor.json is not a noise floor"):
        read_floor(tmp_path / "floor.json")
