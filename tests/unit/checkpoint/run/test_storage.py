"""Folders appear whole or not at all, on disks and object stores alike, and their hashes are right.

The references are hashlib over the bytes, and the file system itself.
"""

from __future__ import annotations

import errno
import hashlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from torchprime.checkpoint.run import storage as storage_module
from torchprime.checkpoint.run.storage import MANIFEST, LocalStorage, Storage
from torchprime.errors import CheckpointError, RuntimeSetupError

BIG = bytes(range(256)) * 26_000  # 6.7 MB: larger than the smallest part that S3 takes


def write(storage: Storage, name: str, content: bytes = b"abc") -> None:
    with storage.create(name) as writer:
        writer.write_bytes("a", content)
        writer.write_bytes(MANIFEST, b"{}")


def test_files_are_written_hashed_and_counted(
    storage: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage_module, "PIECE", 6_000_000)  # one write in pieces, large and small
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
    if not isinstance(storage, LocalStorage):
        removed = []
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


def test_an_older_folder_survives_a_failure(tmp_path: Path) -> None:
    storage = Storage.of(str(tmp_path / "new" / "place"))
    write(storage, "one", b"old")
    with pytest.raises(KeyError), storage.create("one") as writer:
        writer.write_bytes("a", b"new")
        raise KeyError
    assert storage.read_bytes("one/a") == b"old"


KILLED = """
import sys, time
from torchprime.checkpoint.run.storage import Storage
with Storage.of(sys.argv[1]).create("one") as writer:
    with writer.stream("a") as file:
        file.write(b"x" * 5_000_000)
        print("written", flush=True)
        time.sleep(60)
"""


def test_a_kill_leaves_a_leftover_that_the_next_clears(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    storage = Storage.of(tmp_path)
    assert storage.names() == [".one.partial"]
    write(storage, "one")
    assert storage.names() == ["one"]


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"one/a failed: no space \(.* GB left\).*checkpoint.folder"),
        (errno.EROFS, "one/a failed: .*right to write"),
        (errno.EIO, "one/a failed: OSError.*Input/output"),
    ],
)
def test_a_disk_that_refuses_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str
) -> None:
    storage = Storage.of(tmp_path)
    write(storage, "zero")

    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=message):
        write(storage, "one")
    assert storage.names() == ["zero"]


def test_a_store_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    storage: Any = Storage.of("memory://refusing/run")

    class Forbidden(Exception):
        """As some libraries raise: neither an OSError nor anything of ours."""

    def refuse(*_: object, **__: object) -> None:
        raise Forbidden("403 for you")

    monkeypatch.setattr(storage._fs, "open", refuse)
    with pytest.raises(CheckpointError, match="memory://refusing/run/one/a failed: Forbidden: 403"):
        write(storage, "one")
    with pytest.raises(CheckpointError, match="Reading .*one/a failed"):
        storage.read_bytes("one/a")


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
    blind = Storage.of(tmp_path / "another")
    with (
        pytest.raises(CheckpointError, match="all processes must share"),
        blind.create("one", main=False) as other,
    ):
        other.write_bytes("b", BIG)


def test_kinds_of_places(tmp_path: Path) -> None:
    assert Storage.of(f"file://{tmp_path}").describe("x") == str(tmp_path / "x")
    assert Storage.of("memory://there/run").describe("x") == "memory://there/run/x"
    with pytest.raises(RuntimeSetupError, match="nosuch://bucket cannot be used"):
        Storage.of("nosuch://bucket")
    assert Storage.of(tmp_path / "not" / "yet").free_bytes() > 0  # type: ignore[operator]
    assert Storage.of("memory://there").free_bytes() is None


def test_a_full_temporary_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = Storage.of("memory://temporary")
    with (
        pytest.raises(CheckpointError, match=f"one/hf to {tmp_path} .TMPDIR sets it.*no space"),
        storage.create("one") as writer,
        writer.local_folder("hf"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []


def test_a_mark_is_seen_where_it_is(storage: Storage, tmp_path: Path) -> None:
    with storage.mark() as mark:
        assert storage.sees(mark)
        assert not Storage.of(tmp_path / "elsewhere" / "checkpoints").sees(f"{mark}.other")
        (tmp_path / "other_host").mkdir()
        assert not Storage.of(tmp_path / "other_host" / "checkpoints").sees(mark)
    assert not storage.sees(mark) and storage.names() == []
