"""sha256 of files, which proves that the content read is the content written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypedDict

from torchprime.files.atomic import open_regular

PIECE = 1 << 20
THREADS = 4  # files read at a time; hashing releases the GIL


class FileFacts(TypedDict):
    """The facts about a file in a manifest."""

    bytes: int
    sha256: str


def sha256_of(file: Any) -> tuple[str, int]:
    """Return sha256 and size of the rest of a stream."""
    digest, size = hashlib.sha256(), 0
    buffer = bytearray(PIECE)
    view = memoryview(buffer)
    while count := file.readinto(buffer):
        digest.update(view[:count])
        size += count
    return digest.hexdigest(), size


def hash_file(path: Path) -> FileFacts:
    """Return size and sha256 of a file.

    Raises:
        OSError: the file cannot be read, or is a pipe or a device.
    """
    with open_regular(path) as file:
        sha256, size = sha256_of(file)
    return {"bytes": size, "sha256": sha256}


def hash_files(paths: Mapping[str, Path]) -> dict[str, FileFacts]:
    """Return size and sha256 of each file, several at a time."""
    with ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1)) as pool:
        return dict(zip(paths, pool.map(hash_file, paths.values()), strict=True))
