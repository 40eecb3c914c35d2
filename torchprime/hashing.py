"""sha256 of files, by which what is read back is known to be what was written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from torchprime.atomic import open_regular

PIECE = 1 << 20
THREADS = 4  # files read at a time; hashing leaves Python to the others


class FileFacts(TypedDict):
    """What a manifest says of a file."""

    bytes: int
    sha256: str


def sha256_of(file: Any) -> tuple[str, int]:
    """sha256 and size of what is left to read."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(PIECE)
    view = memoryview(buffer)
    while count := file.readinto(buffer):
        digest.update(view[:count])
        size += count
    return digest.hexdigest(), size


def hash_file(path: Path) -> FileFacts:
    """Size and sha256 of a file.

    Raises:
        OSError: it cannot be read, or is a pipe or a device.
    """
    with open_regular(path) as file:
        sha256, size = sha256_of(file)
    return {"bytes": size, "sha256": sha256}


def hash_files(paths: Mapping[str, Path]) -> dict[str, FileFacts]:
    """Size and sha256 of each file, several at a time."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(hash_file, paths.values()), strict=True))
