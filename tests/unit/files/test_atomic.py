"""An interrupted write leaves the whole new file or the unchanged old one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from torchprime.errors import CheckpointError
from torchprime.files.atomic import atomic_folder, remove_folder, write_json, write_text


def test_text_replaces_what_was_there_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    write_text(path, "Straße 東京\n")
    assert path.read_bytes() == "Straße 東京\n".encode()
    assert list(tmp_path.iterdir()) == [path]


def test_text_that_fails_in_the_middle_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"


def test_json_keeps_the_order_and_the_characters(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"z": "é", "a": [1]})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == (
        '{\n  "z": "é",\n  "a": [\n    1\n  ]\n}\n'
    )


@pytest.mark.parametrize(("umask", "folder_mode"), [(0o077, 0o700), (0o027, 0o750), (0, 0o755)])
def test_a_folder_appears_at_the_end_readable_as_the_umask_says(
    tmp_path: Path, umask: int, folder_mode: int
) -> None:
    out = tmp_path / "deep" / "out"
    previous = os.umask(umask)
    try:
        with atomic_folder(out) as folder:
            (folder / "more").mkdir()
            (folder / "more" / "a").write_text("1")
            (folder / "more" / "a").chmod(0o600)  # as libraries leave theirs
            assert not out.exists()
    finally:
        os.umask(previous)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in (out, *out.rglob("*"))}
    assert modes == {"out": folder_mode, "more": folder_mode, "a": folder_mode & 0o644}
    assert list(out.parent.iterdir()) == [out]


def test_an_exception_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_the_leftover_of_a_kill_is_cleared(tmp_path: Path) -> None:
    leftover = tmp_path / ".out.partial"
    leftover.mkdir()
    (leftover / "half").write_text("half")
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_an_empty_target_is_fine(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "a").write_text("1")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "a"]


def test_a_target_that_is_used_is_refused_and_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(CheckpointError, match="already holds 1 entries"), atomic_folder(out):
        pass
    (tmp_path / "file").write_text("old")
    with pytest.raises(CheckpointError, match="not a folder"), atomic_folder(tmp_path / "file"):
        pass
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "old", "out"]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match="already holds"), atomic_folder(out):
        out.mkdir()
        (out / "theirs").write_text("theirs")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "theirs"]


def test_a_replaced_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(out, replace=True) as folder:
        (folder / "new").write_text("new")
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with atomic_folder(out, replace=True) as folder:
        (folder / "new").write_text("new")
        assert (out / "old").read_text() == "old"
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_a_removed_folder_is_renamed_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("1")
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda *_, **__: None)  # killed before anything is deleted
        remove_folder(out)
    assert sorted(path.name for path in tmp_path.rglob("*")) == [".out.removed", "a"]
    out.mkdir()
    remove_folder(out)  # the leftover is in the way of nothing
    remove_folder(out)  # nor is its absence
    assert list(tmp_path.iterdir()) == []
