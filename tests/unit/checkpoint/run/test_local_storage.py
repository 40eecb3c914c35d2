"""A local folder: what a failure, a kill or a disk that refuses leaves there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from torchprime.checkpoint.run.local_storage import LocalStorage, existing_part
from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.errors import CheckpointError


def write(storage: Storage, name: str, content: bytes = b"abc") -> None:
    with storage.create(name) as writer:
        writer.write_bytes("a", content)
        writer.write_bytes(MANIFEST, b"{}")


def test_an_older_folder_survives_a_failure(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path / "new" / "place")
    write(storage, "one", b"old")
    with pytest.raises(KeyError), storage.create("one") as writer:
        writer.write_bytes("a", b"new")
        raise KeyError
    assert storage.read_bytes("one/a") == b"old"


KILLED = """
import sys, time
from torchprime.checkpoint.run.open_storage import open_storage
with open_storage(sys.argv[1]).create("one") as writer:
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
    storage = LocalStorage(tmp_path)
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
    storage = LocalStorage(tmp_path)
    write(storage, "zero")

    def refuse(_: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(CheckpointError, match=message):
        write(storage, "one")
    assert storage.names() == ["zero"]


def test_the_part_of_a_path_that_exists(tmp_path: Path) -> None:
    assert existing_part(tmp_path / "not" / "yet") == tmp_path
    assert existing_part(tmp_path) == tmp_path
