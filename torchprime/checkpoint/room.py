"""Checks for disk space before a run: bytes, and inodes for file names."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from torchprime.checkpoint.run.local_storage import existing_part
from torchprime.errors import CheckpointError


class Need(NamedTuple):
    """Data that will be written to a folder that may not exist yet.

    Attributes:
        what: for the message: "the export".
        key: of the config or command, that chooses another folder.
    """

    what: str
    place: Path
    bytes: int
    files: int
    key: str


def require_room(needs: Sequence[Need]) -> None:
    """Raise a CheckpointError if a disk lacks room for all data that goes to it together."""
    by_disk: dict[int, list[Need]] = {}
    for need in needs:
        by_disk.setdefault(os.stat(existing_part(need.place)).st_dev, []).append(need)
    for together in by_disk.values():
        _require(together)


def _require(needs: Sequence[Need]) -> None:
    place = existing_part(needs[0].place)
    free, wanted = shutil.disk_usage(place).free, sum(need.bytes for need in needs)
    if wanted > free:
        parts = ", ".join(f"{need.what} {_size(need.bytes)}" for need in needs if need.bytes)
        raise CheckpointError(
            f"{needs[0].place} has no room: {_size(wanted)} are needed there ({parts}), and "
            f"{_size(free)} are free. {_advice(needs)}"
        )
    names = os.statvfs(place)
    files = sum(need.files for need in needs)
    # File systems without a fixed number of inodes report 0 of 0.
    if names.f_files and names.f_favail < files:
        raise CheckpointError(
            f"{needs[0].place} has no room: about {files} files are to be made there, and the file "
            f"system has {names.f_favail} inodes left. {_advice(needs)}"
        )


def _advice(needs: Sequence[Need]) -> str:
    keys = " or ".join(dict.fromkeys(need.key for need in needs))
    return f"Make room, or set {keys} to another disk."


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e7 else f"{count / 1e6:.2f} MB"
