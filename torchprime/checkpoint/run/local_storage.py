"""Storage of checkpoints in a local folder, or in a network folder that all machines share.

A checkpoint is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from torchprime.checkpoint.run.storage import PROBE, FolderWriter, Storage, files_under
from torchprime.errors import CheckpointError
from torchprime.files.atomic import (
    atomic_folder,
    clear_temporary,
    make_folder,
    open_new,
    open_regular,
    partial_of,
    remove_folder,
    sync,
    write_bytes,
)
from torchprime.files.hashing import hash_file

LEFTOVER = re.compile(r"\..*\.(partial|removed)")  # temporary names, as files/atomic.py makes them


class _LocalFolderWriter(FolderWriter):
    def __init__(self, storage: Storage, name: str, hasher: Executor, folder: Path) -> None:
        super().__init__(storage, name, hasher)
        self._folder = folder

    @property
    def where(self) -> tuple[Storage, str]:
        return self._storage, self._folder.name

    @contextmanager
    def local_folder(self, name: str) -> Iterator[Path]:
        folder = self._folder / name
        with self._storage.telling(f"Writing {self._storage.describe(f'{self._name}/{name}')}"):
            folder.mkdir(parents=True, exist_ok=True)
            yield folder
            for path in files_under(folder):
                sync(path)
                self.files[f"{name}/{path.relative_to(folder).as_posix()}"] = hash_file(path)

    def _open(self, name: str) -> BinaryIO:
        path = self._folder / name
        if not self._folder.is_dir():
            raise CheckpointError(
                f"{self._folder} was made by the first process, and this one does not see it: all "
                "processes must share the checkpoint folder. Use a shared file system, or set "
                "checkpoint.folder to a URL such as gs://BUCKET/RUN."
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        return open_new(path)

    def _push(self, file: BinaryIO) -> None:
        """Start writeback, and drop the pages from the cache. Otherwise the disk would idle while
        bytes are hashed, fsync would wait at the end, and the cache would hold the whole model."""
        file.flush()
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def _sync(self, file: BinaryIO) -> None:
        file.flush()
        os.fsync(file.fileno())


class LocalStorage(Storage):
    """A local folder, or a network folder that all machines share."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser()

    def describe(self, name: str = "") -> str:
        return str(self.root / name)

    def names(self) -> list[str]:
        with self.telling(f"Reading {self.root}"):
            return sorted(os.listdir(self.root)) if self.root.is_dir() else []

    def size(self, name: str) -> int | None:
        path = self.root / name
        with self.telling(f"Looking at {path}"):
            return path.stat().st_size if path.is_file() else None

    def open(self, name: str) -> BinaryIO:
        with self.telling(f"Reading {self.root / name}"):
            return open_regular(self.root / name)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.telling(f"Writing {self.root / name}"):
            make_folder(self.root)
            write_bytes(self.root / name, data)

    @contextmanager
    def _folder(self, name: str, hasher: Executor, main: bool) -> Iterator[FolderWriter]:
        if not main:
            yield _LocalFolderWriter(self, name, hasher, partial_of(self.root / name))
            return
        make_folder(self.root)
        with atomic_folder(self.root / name, replace=True) as folder:
            yield _LocalFolderWriter(self, name, hasher, folder)

    def remove(self, folder_name: str) -> None:
        with self.telling(f"Removing {self.root / folder_name}"):
            remove_folder(self.root / folder_name)

    def remove_file(self, name: str) -> None:
        with self.telling(f"Removing {self.root / name}"):
            (self.root / name).unlink(missing_ok=True)

    def rename(self, folder_name: str, new_name: str) -> None:
        with self.telling(f"Renaming {self.root / folder_name}"):
            os.rename(self.root / folder_name, self.root / new_name)
            sync(self.root)

    def leftovers(self) -> list[str]:
        return [name for name in self.names() if LEFTOVER.fullmatch(name)]

    def clear_temporary(self) -> None:
        clear_temporary(self.root)

    def free_bytes(self) -> int | None:
        return shutil.disk_usage(existing_part(self.root)).free

    @contextmanager
    def mark(self) -> Iterator[str]:
        """Write the mark into the nearest folder that exists: nothing is created yet."""
        there = existing_part(self.root)
        if not there.is_dir():
            raise CheckpointError(f"{self.root} can't be written: {there} is a file.")
        with (
            self.telling(f"Writing to {there}"),
            tempfile.NamedTemporaryFile(dir=there, prefix=PROBE) as file,
        ):
            file.write(b"torchprime")
            file.flush()
            os.fsync(file.fileno())
            yield Path(file.name).name

    def sees(self, mark: str) -> bool:
        """Return True if another process's mark exists in the nearest existing folder."""
        return (existing_part(self.root) / mark).exists()


def existing_part(path: Path) -> Path:
    """Return the path itself if it exists, else its nearest existing parent."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())
