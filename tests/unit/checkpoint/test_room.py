"""Disk space before a run: the needs of one disk are added up."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchprime.checkpoint import room
from torchprime.checkpoint.room import Need, require_room
from torchprime.errors import CheckpointError

FREE = 1_000_000_000


@pytest.fixture(autouse=True)
def disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk with 1 GB and 100 inodes left."""
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=FREE))
    names = SimpleNamespace(f_files=1000, f_favail=100)
    monkeypatch.setattr(room.os, "statvfs", lambda place: names)


def need(folder: Path, count: int, files: int = 1, key: str = "output_dir") -> Need:
    return Need("data", folder / "not" / "yet", count, files, key)


def test_exactly_the_free_space_is_enough(tmp_path: Path) -> None:
    require_room([need(tmp_path, FREE - 1), need(tmp_path, 1), need(tmp_path, 0, 98)])
    require_room([])


def test_needs_of_one_disk_are_added_up(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        require_room([need(tmp_path, FREE), need(tmp_path, 2_000_000, key="checkpoint.folder")])
    assert "1.00 GB are needed there (data 1.00 GB, data 2.00 MB), and 1.00 GB are free" in str(
        caught.value
    )
    assert "set output_dir or checkpoint.folder to another disk" in str(caught.value)


def test_files_need_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"about 101 files .* has 100 inodes left"):
        require_room([need(tmp_path, 0, 50), need(tmp_path, 0, 51)])
    unlimited = SimpleNamespace(f_files=0, f_favail=0)
    monkeypatch.setattr(room.os, "statvfs", lambda place: unlimited)
    require_room([need(tmp_path, 0, 1_000_000)])


def test_disks_are_looked_at_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()

    def stat(place: Path) -> SimpleNamespace:
        return SimpleNamespace(st_dev=1 if "a" in Path(place).parts else 2)

    monkeypatch.setattr(room, "os", SimpleNamespace(stat=stat, statvfs=room.os.statvfs))
    require_room([need(tmp_path / "a", FREE), need(tmp_path / "b", FREE)])
