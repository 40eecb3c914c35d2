"""Prepared data appears whole or not at all, and damage is noticed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torchprime.data.shared import cache


def write(folder: Path) -> None:
    (folder / "a.bin").write_bytes(b"12345")
    (folder / "b.bin").write_bytes(b"")


def test_built_once_and_found(tmp_path: Path) -> None:
    key = cache.cache_key({"rows": "x"})
    assert cache.find(tmp_path, key) is None
    folder = cache.build(tmp_path, key, {"rows": "x"}, write)
    assert folder == cache.find(tmp_path, key) == tmp_path / key
    assert [p.name for p in tmp_path.iterdir()] == [key]


def test_key_sees_every_ingredient_and_not_their_order() -> None:
    one = cache.cache_key({"a": 1, "b": [1, 2]})
    assert one == cache.cache_key({"b": [1, 2], "a": 1})
    assert len({one, cache.cache_key({"a": 1, "b": [2, 1]}), cache.cache_key({"a": 2})}) == 3


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "more", "manifest"])
def test_damage_is_not_found_and_built_again(tmp_path: Path, damage: str) -> None:
    folder = cache.build(tmp_path, "k", {}, write)
    if damage == "cut":
        (folder / "a.bin").write_bytes(b"123")
    elif damage == "flipped":
        (folder / "a.bin").write_bytes(b"12344")
    elif damage == "more":
        (folder / "c.bin").write_bytes(b"")
    elif damage == "gone":
        (folder / "b.bin").unlink()
    else:
        (folder / cache.MANIFEST).write_text('{"files"')
    assert cache.find(tmp_path, "k") is None
    cache.build(tmp_path, "k", {}, write)
    assert cache.find(tmp_path, "k") == folder
    assert (folder / "a.bin").read_bytes() == b"12345"


def test_files_are_read_once_per_process_unless_they_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache.build(tmp_path, "k", {}, write)
    said: list[str] = []
    read: list[str] = []
    original = cache.hash_files
    monkeypatch.setattr(cache, "hash_files", lambda paths: read.extend(paths) or original(paths))
    for _ in range(3):
        assert cache.find(tmp_path, "k", said.append) == folder
    assert sorted(read) == ["a.bin", "b.bin"] and not said
    facts = (folder / "a.bin").stat()
    (folder / "a.bin").write_bytes(b"12346")
    os.utime(folder / "a.bin", ns=(facts.st_atime_ns, facts.st_mtime_ns))
    assert cache.find(tmp_path, "k", said.append) is None
    (line,) = said
    assert str(folder) in line and "a.bin is not as it was written (its sha256 differs)" in line
    assert (tmp_path / f"k{cache.DAMAGED}" / "a.bin").read_bytes() == b"12346"
    assert cache.build(tmp_path, "k", {}, write) == cache.find(tmp_path, "k", said.append) == folder
    assert len(said) == 1


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o700), (0o002, 0o755)])
def test_modes_are_the_umasks_and_nobody_else_writes(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        folder = cache.build(tmp_path / "deep" / "root", "k", {}, write)
    finally:
        os.umask(before)
    found = {p.stat().st_mode & 0o777 for p in (folder, folder.parent, folder.parent.parent)}
    assert found == {mode}
    assert {p.stat().st_mode & 0o777 for p in folder.iterdir()} == {mode & 0o644}


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        write(folder)
        raise ValueError("no more rows")

    with pytest.raises(ValueError, match="no more rows"):
        cache.build(tmp_path, "k", {}, fail)
    assert list(tmp_path.iterdir()) == []


def test_a_kill_leaves_no_half_and_the_next_cleans_up(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from torchprime.data.shared import cache\n"
        "def write(folder):\n"
        "    (folder / 'a.bin').write_bytes(b'12'); print('writing', flush=True); time.sleep(60)\n"
        "cache.build(Path(sys.argv[1]), 'k', {}, write)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "writing\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert cache.find(tmp_path, "k") is None
    assert len(list(tmp_path.iterdir())) == 1, "the unfinished folder"
    cache.build(tmp_path, "k", {}, write)
    assert [p.name for p in tmp_path.iterdir()] == ["k"]


def test_a_running_neighbour_is_left_alone(tmp_path: Path) -> None:
    theirs = tmp_path / f"k{cache.PARTIAL}{os.uname().nodename}-{os.getppid()}"
    theirs.mkdir()
    cache.build(tmp_path, "other", {}, write)
    assert theirs.is_dir()


def test_a_later_setting_is_in_the_key_if_it_is_not_the_default() -> None:
    """So that data prepared before it existed is still found."""
    older = {"packing": "bfd", "split": None}
    assert cache.chosen({**older, "average": "tokens", "weight_key": None}) == older
    assert cache.chosen({**older, "average": "examples"}) == {**older, "average": "examples"}
