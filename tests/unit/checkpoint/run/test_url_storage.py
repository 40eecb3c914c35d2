"""A place that fsspec knows: what is said if a store or the temporary disk refuses."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.checkpoint.run.url_storage import UrlStorage
from torchprime.errors import CheckpointError


def write(storage: Storage, name: str, content: bytes = b"abc") -> None:
    with storage.create(name) as writer:
        writer.write_bytes("a", content)
        writer.write_bytes(MANIFEST, b"{}")


def test_a_store_that_refuses_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = UrlStorage("memory://refusing/run")

    class Forbidden(Exception):
        """As some libraries raise: neither an OSError nor anything of ours."""

    def refuse(*_: object, **__: object) -> None:
        raise Forbidden("403 for you")

    monkeypatch.setattr(storage._fs, "open", refuse)
    with pytest.raises(CheckpointError, match="memory://refusing/run/one/a failed: Forbidden: 403"):
        write(storage, "one")
    with pytest.raises(CheckpointError, match="Reading .*one/a failed"):
        storage.read_bytes("one/a")


def test_a_full_temporary_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    storage = UrlStorage("memory://temporary")
    with (
        pytest.raises(CheckpointError, match=f"one/hf to {tmp_path} .TMPDIR sets it.*no space"),
        storage.create("one") as writer,
        writer.local_folder("hf"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
