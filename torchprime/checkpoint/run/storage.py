"""Storage of checkpoints: what a local folder and a URL have in common.

A checkpoint is a folder that exists whole or not at all: see `Storage.create`, local_storage.py and
url_storage.py. `open_storage` (open_storage.py) returns the storage at a place.
"""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

from torchprime.checkpoint.run.hashing_file import HashingFile
from torchprime.errors import CheckpointError, UserError
from torchprime.files.hashing import FileFacts

MANIFEST = "manifest.json"
SMALL_FILE = 256 << 20  # larger than any tokenizer, and than any manifest
HASHERS = 4  # threads, and files that are written at a time
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
PROBE = ".torchprime-probe-"


class FolderWriter(ABC):
    """A folder that is being written. `files` lists its files so far, in the manifest's form.

    Several processes may write into one folder, each its own files; the main one takes over what
    the others wrote with `adopt`.
    """

    def __init__(self, storage: Storage, name: str, hasher: Executor) -> None:
        self.files: dict[str, FileFacts] = {}
        self._storage, self._name, self._hasher = storage, name, hasher

    @contextmanager
    def stream(self, name: str) -> Iterator[HashingFile]:
        """Write a file piece by piece; on exit it is on the disk or in the object store."""
        assert MANIFEST not in self.files, f"{name} comes after the manifest"
        doing = f"Writing {self._storage.describe(f'{self._name}/{name}')}"
        telling = partial(self._storage.telling, doing)
        with telling():
            file = self._open(name)
        hashing = HashingFile(file, self._hasher, telling, self._push)
        try:
            yield hashing
        except BaseException:
            with suppress(Exception):  # report the first error, not one that followed from it
                file.close()
            if hashing.failure is not None:  # torch.save raises its own error instead
                raise hashing.failure from None
            raise
        with telling(), file:
            hashing.hand_on()
            self._sync(file)
        self.files[name] = hashing.facts()

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file."""
        with self.stream(name) as file:
            file.write(data)

    def adopt(self, files: Mapping[str, FileFacts]) -> None:
        """Add files that other processes have written."""
        self.files.update(files)

    @property
    def where(self) -> tuple[Storage, str]:
        """The place where the files written so far can be read: a storage, and a folder's name in
        it."""
        return self._storage, self._name

    @abstractmethod
    @contextmanager
    def local_folder(self, name: str) -> Iterator[Path]:
        """Yield a local folder for code that writes files itself; its files become NAME/..."""
        raise NotImplementedError
        yield

    @abstractmethod
    def _open(self, name: str) -> BinaryIO:
        """Return the file, opened for writing."""

    @abstractmethod
    def _push(self, file: BinaryIO) -> None:
        """Start writing the bytes to the disk, without waiting."""

    @abstractmethod
    def _sync(self, file: BinaryIO) -> None:
        """Wait until the bytes are stored durably."""


class Storage(ABC):
    """Folders and small files by name, in one place."""

    failures: tuple[type[Exception], ...] = (OSError,)  # errors that the place itself may raise

    @abstractmethod
    def describe(self, name: str = "") -> str:
        """Return the full path or URL, for messages."""

    @abstractmethod
    def names(self) -> list[str]:
        """Return the names in a folder, hidden ones too, sorted; empty if the folder does not exist
        yet."""

    @abstractmethod
    def size(self, name: str) -> int | None:
        """Return a file's size in bytes; None if there is no such file."""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """Open a file for reading, seekable."""

    @abstractmethod
    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a small file whole or not at all."""

    @abstractmethod
    @contextmanager
    def _folder(self, name: str, hasher: Executor, main: bool) -> Iterator[FolderWriter]:
        """Create and finish the folder as `create` specifies."""
        raise NotImplementedError
        yield

    @abstractmethod
    def remove(self, folder_name: str) -> None:
        """Remove a folder, if it exists: its manifest first, then its other files."""

    @abstractmethod
    def remove_file(self, name: str) -> None:
        """Remove a small file, if it exists."""

    @abstractmethod
    def rename(self, folder_name: str, new_name: str) -> None:
        """Rename a folder to an unused name; after a kill at least one of both names exists."""

    @abstractmethod
    def leftovers(self) -> list[str]:
        """Return the folders that are being written or removed now, or that a killed process
        left."""

    def clear_temporary(self) -> None:
        """Remove small files that a killed process left incomplete."""
        return None

    @abstractmethod
    def free_bytes(self) -> int | None:
        """Return the free space in bytes; None if it is unknown."""

    def probe(self) -> None:
        """Write, read back and remove a small file, so that a missing permission is found early.

        Raises:
            CheckpointError: no permission, no credentials, no such bucket, a disk that is full.
        """
        with self.mark():
            pass

    @abstractmethod
    def mark(self) -> AbstractContextManager[str]:
        """Write a small temporary file and return its name, with which other processes call `sees`.

        Raises:
            CheckpointError: as for `probe`.
        """

    @abstractmethod
    def sees(self, mark: str) -> bool:
        """Return True if another process's mark exists here: then both use the same place."""

    def exists(self, name: str) -> bool:
        """Return True if the file exists."""
        return self.size(name) is not None

    def read_bytes(self, name: str, most: int = SMALL_FILE) -> bytes:
        """Return the content of a small file.

        Args:
            most: bytes that such a file may have.

        Raises:
            CheckpointError: it has more, or cannot be read.
        """
        with self.telling(f"Reading {self.describe(name)}"), self.open(name) as file:
            data = file.read(most + 1)
        if len(data) > most:
            raise CheckpointError(
                f"{self.describe(name)} has more than {most:,} bytes, which no run writes there. "
                "It is damaged, or not a checkpoint's."
            )
        return data

    @contextmanager
    def create(self, folder_name: str, *, main: bool = True) -> Iterator[FolderWriter]:
        """Write a folder that appears whole on exit, replacing an older one if there is any.

        The last file written must be the manifest. After an exception or a kill there is no such
        folder, or still the older one.

        Args:
            main: false in all processes but one. The main process must enter before, and leave
                after, the others write: exchange something (see `write_shards`) in between.

        Raises:
            CheckpointError: no space, no permission, or what else the place says.
        """
        with (
            ThreadPoolExecutor(HASHERS, thread_name_prefix="hash") as hasher,
            self.telling(f"Writing {self.describe(folder_name)}", (OSError,)),
            self._folder(folder_name, hasher, main) as writer,
        ):
            yield writer
            assert not main or list(writer.files)[-1:] == [MANIFEST], "the manifest comes last"

    @contextmanager
    def telling(
        self, doing: str, failures: tuple[type[Exception], ...] | None = None
    ) -> Iterator[None]:
        """Convert the errors of the place into messages that say what to do."""
        failures = failures or self.failures
        try:
            yield
        except UserError:
            raise
        except failures as error:
            raise CheckpointError(f"{doing} failed: {self._advice(error)}") from error

    def _advice(self, error: Exception) -> str:
        code = error.errno if isinstance(error, OSError) else None
        if code in FULL:
            free = self.free_bytes()
            left = "" if free is None else f" ({free / 1e9:.2f} GB left)"
            return (
                f"no space{left}. Nothing else was touched; earlier checkpoints are as they were. "
                "Free space, keep fewer (checkpoint.keep_last, keep_best, keep_every), or set "
                "checkpoint.folder to another disk."
            )
        if code in FORBIDDEN:
            return f"{error}. Give this user the right to write there, or set checkpoint.folder."
        return f"{type(error).__name__}: {error}."


def files_under(folder: Path) -> list[Path]:
    """Return the files in a folder and in those below it, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file())
