"""Bytes reach the file in order, and the hash is hashlib's over them."""

from __future__ import annotations

import hashlib
import io
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from torchprime.checkpoint.run import hashing_file
from torchprime.checkpoint.run.hashing_file import HashingFile
from torchprime.errors import CheckpointError


def test_small_and_large_writes_are_hashed_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing_file, "INLINE", 8)
    monkeypatch.setattr(hashing_file, "PIECE", 16)
    parts = [b"a", b"bc", b"d" * 7, b"e" * 40, b"f", b"g" * 16, b"h"]
    out, pushed = io.BytesIO(), []
    with ThreadPoolExecutor(1) as hasher:
        file = HashingFile(out, hasher, nullcontext, lambda f: pushed.append(f.tell()))
        assert [file.write(part) for part in parts] == [len(part) for part in parts]
        assert file.tell() == sum(map(len, parts))
        file.hand_on()
    assert out.getvalue() == b"".join(parts)
    assert file.facts() == {
        "bytes": len(out.getvalue()),
        "sha256": hashlib.sha256(out.getvalue()).hexdigest(),
    }
    assert len(pushed) >= 3


def test_the_first_failure_is_remembered() -> None:
    """torch.save raises an error of its own instead."""

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise CheckpointError("no space left")

    with ThreadPoolExecutor(1) as hasher:
        file = HashingFile(Full(), hasher, nullcontext, lambda f: None)
        with pytest.raises(CheckpointError, match="no space left"):
            file.write(bytes(2 << 20))
    assert str(file.failure) == "no space left"
