"""Folders appear whole or not at all, on disks and object stores alike, and their hashes are right.

The references are hashlib over the bytes, and the file system itself.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from torchprime.checkpoint.run import hashing_file, url_storage
from torchprime.checkpoint.run.local_storage import LocalStorage
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.errors import CheckpointError

BIG = bytes(range(256)) * 26_000  # 6.7 MB: larger than the smallest part that S3 takes


def write(storage: Storage, name: str, content: bytes = b"abc") -> None:
    with storage.create(name) as writer:
        writer.write_bytes("a", content)
        writer.write_bytes(MANIFEST, b"{}")


def test_files_are_written_hashed_and_counted(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (hashing_file, url_storage):  # one write in pieces, large and small
        monkeypatch.setattr(module, "PIECE", 6_000_000)
    with storage.create("one") as writer:
        with writer.stream("deep/big") as file:
            file.write(b"head")
            file.write(memoryview(BIG))
        with writer.local_folder("hf") as folder:
            (folder / "more").mkdir()
            (folder / "more" / "x").write_bytes(BIG[:1000])
        writer.write_bytes(MANIFEST, b"{}")
    contents = {"deep/big": b"head" + BIG, "hf/more/x": BIG[:1000], MANIFEST: b"{}"}
    assert writer.files == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in contents.items()
    }
    for name, data in contents.items():
        assert storage.read_bytes(f"one/{name}") == data
        assert storage.size(f"one/{name}") == len(data)
    with storage.open("one/deep/big") as file:
        file.seek(4)
        assert file.read(256) == BIG[:256]
    assert storage.names() == ["one"]


def test_small_files_are_replaced(storage: Storage) -> None:
    assert storage.names() == [] and storage.size("latest") is None
    storage.write_bytes("latest", b"one")
    storage.write_bytes("latest", b"two")
    assert storage.read_bytes("latest") == b"two"
    assert storage.names() == ["latest"]


def test_an_exception_leaves_no_folder(storage: Storage) -> None:
    with pytest.raises(KeyError), storage.create("one") as writer:
        writer.write_bytes("a", b"abc")
        raise KeyError("ours")
    assert not storage.exists(f"one/{MANIFEST}")
    if isinstance(storage, LocalStorage):
        assert storage.names() == []


def test_the_manifest_comes_last(storage: Storage) -> None:
    with pytest.raises(AssertionError, match="last"), storage.create("one") as writer:
        writer.write_bytes("a", b"abc")
    with pytest.raises(AssertionError, match="after"), storage.create("two") as writer:
        writer.write_bytes(MANIFEST, b"{}")
        writer.write_bytes("a", b"abc")
    assert not storage.exists("one/a") or not isinstance(storage, LocalStorage)


def test_an_older_folder_is_replaced(storage: Storage) -> None:
    with storage.create("one") as writer:
        writer.write_bytes("old", b"old")
        writer.write_bytes(MANIFEST, b"{}")
    write(storage, "one")
    assert storage.read_bytes("one/a") == b"abc"
    assert not storage.exists("one/old")
    assert storage.names() == ["one"]


def test_removing_takes_the_manifest_first(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(storage, "one")
    removed = []
    if not isinstance(storage, LocalStorage):
        real = storage._fs.rm  # type: ignore[attr-defined]
        monkeypatch.setattr(
            storage._fs,  # type: ignore[attr-defined]
            "rm",
            lambda path, **options: (removed.append(path), real(path, **options)),
        )
    storage.remove("one")
    storage.remove("one")  # what is not there is no error
    assert storage.names() == []
    if not isinstance(storage, LocalStorage):
        assert [path.rpartition("/")[2] for path in removed] == [MANIFEST, "one"]


def test_our_own_mistakes_keep_their_traceback(storage: Storage) -> None:
    with (
        pytest.raises(ZeroDivisionError),
        storage.create("one") as writer,
        writer.stream("a") as file,
    ):
        file.write(b"abc")
        _ = 1 / 0


def test_several_processes_share_a_folder(storage: Storage, tmp_path: Path) -> None:
    with storage.create("one") as main, storage.create("one", main=False) as other:
        main.write_bytes("a", b"abc")
        other.write_bytes("b", BIG)
        main.adopt(other.files)
        main.write_bytes(MANIFEST, b"{}")
    assert storage.read_bytes("one/b") == BIG
    assert main.files["b"]["bytes"] == len(BIG)
    blind = open_storage(tmp_path / "another")
    with (
        pytest.raises(CheckpointError, match="all processes must share"),
        blind.create("one", main=False) as other,
    ):
        other.write_bytes("b", BIG)


def test_a_mark_is_seen_where_it_is(storage: Storage, tmp_path: Path) -> None:
    with storage.mark() as mark:
        assert storage.sees(mark)
        assert not open_storage(tmp_path / "elsewhere" / "checkpoints").sees(f"{mark}.other")
        (tmp_path / "other_host").mkdir()
        assert not open_storage(tmp_path / "other_host" / "checkpoints").sees(mark)
    assert not storage.sees(mark) and storage.names() == []
