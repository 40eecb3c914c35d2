"""sha256 of files, against hashlib on the whole content."""

from __future__ import annotations

import hashlib
import io
import os
from pathlib import Path

import pytest

from torchprime.files.hashing import PIECE, hash_file, hash_files, sha256_of

CONTENTS = [b"", b"abc", bytes(range(256)) * 5, b"x" * PIECE, b"y" * (2 * PIECE + 7)]


@pytest.mark.parametrize("content", CONTENTS, ids=len)
def test_any_length_has_the_hash_of_the_whole(content: bytes, tmp_path: Path) -> None:
    wanted = hashlib.sha256(content).hexdigest()
    assert sha256_of(io.BytesIO(content)) == (wanted, len(content))
    (tmp_path / "f").write_bytes(content)
    assert hash_file(tmp_path / "f") == {"bytes": len(content), "sha256": wanted}


def test_only_the_rest_of_a_stream_is_hashed() -> None:
    stream = io.BytesIO(b"headabc")
    stream.seek(4)
    assert sha256_of(stream) == (hashlib.sha256(b"abc").hexdigest(), 3)


def test_many_files_keep_their_names_and_order(tmp_path: Path) -> None:
    paths = {f"f{number}": tmp_path / str(number) for number in range(9)}
    for name, path in paths.items():
        path.write_text(name)
    found = hash_files(paths)
    assert list(found) == list(paths)
    for name, facts in found.items():
        assert facts == {"bytes": 2, "sha256": hashlib.sha256(name.encode()).hexdigest()}
    assert hash_files({}) == {}


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="regular file"):
        hash_file(tmp_path / "pipe")
    with pytest.raises(FileNotFoundError):
        hash_file(tmp_path / "none")
