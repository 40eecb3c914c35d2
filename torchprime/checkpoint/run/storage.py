"""Storage of checkpoints: a local folder, or any place that fsspec knows (gs://, s3://, memory://).

A checkpoint is a folder that exists whole or not at all. Locally it is written under a temporary
name, synced and renamed. Object stores can't rename, so there the manifest decides: it is written
last and deleted first, and a folder without one does not exist. Every file is hashed in a thread
while it is written, so that the bytes are read once and the manifest can name their sha256.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.core import url_to_fs

from torchprime.errors import CheckpointError, RuntimeSetupError, UserError
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
from torchprime.files.hashing import FileFacts, hash_file

MANIFEST = "manifest.json"
PIECE = 32 << 20  # bytes written while they are hashed; for URLs, also the buffer size
INLINE = 1 << 20  # below this, passing bytes to another thread takes longer than hashing them
SMALL_FILE = 256 << 20  # larger than any tokenizer, and than any manifest
HASHERS = 4  # threads, and files that are written at a time
OBJECT_STORES = {"abfs", "abfss", "adl", "az", "gcs", "gs", "hf", "oss", "s3", "s3a"}
LEFTOVER = re.compile(r"\..*\.(partial|removed)")  # temporary names, as files/atomic.py makes them
FULL = (errno.ENOSPC, errno.EDQUOT)
PROBE = ".torchprime-probe-"
_GOOGLE = (
    "Check the bucket's name. `gcloud auth application-default login` gives this user credentials; "
    "a Cloud VM needs the scope cloud-platform and the role Storage Object Admin."
)
_AMAZON = (
    "Check the bucket's name, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and "
    "AWS_ENDPOINT_URL for a store of another maker."
)
CREDENTIALS = {"gs": _GOOGLE, "gcs": _GOOGLE, "s3": _AMAZON, "s3a": _AMAZON}
FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)


class HashingFile:
    """A file being written, with its size and hash; `torch.save` can write to it.

    Args:
        telling: converts errors into messages that name the file.
        push: starts writing the data so far to the disk, called every PIECE bytes.
    """

    def __init__(
        self,
        file: BinaryIO,
        hasher: Executor,
        telling: Callable[[], AbstractContextManager[None]],
        push: Callable[[BinaryIO], None],
    ) -> None:
        self._file, self._hasher, self._telling, self._push = file, hasher, telling, push
        self._digest = hashlib.sha256()
        self._small = bytearray()  # an archive's headers come in dozens of writes
        self._bytes = self._unpushed = 0
        self.failure: CheckpointError | None = None

    def write(self, data: bytes | memoryview) -> int:
        """Write all data; large pieces are hashed by another thread meanwhile."""
        view = memoryview(data).cast("B")
        self._bytes += len(view)
        if len(view) < INLINE:
            self._small += view
            if len(self._small) >= INLINE:
                self.hand_on()
            return len(view)
        self.hand_on()
        for start in range(0, len(view), PIECE):
            self._write_piece(view[start : start + PIECE])
        return len(view)

    def _write_piece(self, piece: memoryview) -> None:
        hashed = self._hasher.submit(self._digest.update, piece)
        try:
            self._put(piece)
        finally:
            hashed.result()  # the caller may free its memory after this call

    def _put(self, piece: memoryview) -> None:
        try:
            with self._telling():
                self._file.write(piece)
                self._unpushed += len(piece)
                if self._unpushed >= PIECE:
                    self._push(self._file)
                    self._unpushed = 0
        except CheckpointError as error:
            self.failure = error
            raise

    def tell(self) -> int:
        return self._bytes

    def hand_on(self) -> None:
        """Write the gathered small pieces."""
        if self._small:
            small, self._small = memoryview(self._small), bytearray()
            self._digest.update(small)
            self._put(small)

    def flush(self) -> None:
        """Do nothing: the data is written at the end; torch.save calls this."""

    def facts(self) -> FileFacts:
        return {"bytes": self._bytes, "sha256": self._digest.hexdigest()}


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
            for path in _files_under(folder):
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


class _UrlFolderWriter(FolderWriter):
    def __init__(self, storage: UrlStorage, name: str, hasher: Executor) -> None:
        super().__init__(storage, name, hasher)
        self._urls = storage

    @contextmanager
    def local_folder(self, name: str) -> Iterator[Path]:
        where = f"{tempfile.gettempdir()} (TMPDIR sets it), to be sent from there,"
        doing = f"Writing {self._storage.describe(f'{self._name}/{name}')} to {where}"
        with (
            self._storage.telling(doing, (OSError,)),
            tempfile.TemporaryDirectory(prefix="torchprime-") as temporary,
        ):
            folder = Path(temporary)
            yield folder
            for path in _files_under(folder):
                with (
                    open_regular(path) as source,
                    self.stream(f"{name}/{path.relative_to(folder).as_posix()}") as target,
                ):
                    for piece in iter(lambda: source.read(PIECE), b""):
                        target.write(piece)

    def _open(self, name: str) -> BinaryIO:
        return self._urls.open_to_write(f"{self._name}/{name}")

    def _push(self, file: BinaryIO) -> None:
        """Do nothing: parts are uploaded as they fill up."""

    def _sync(self, file: BinaryIO) -> None:
        """Do nothing: closing the file uploads it or raises."""


class Storage(ABC):
    """Folders and small files by name, in one place."""

    failures: tuple[type[Exception], ...] = (OSError,)  # errors that the place itself may raise

    @staticmethod
    def of(place: str | Path) -> Storage:
        """Return the storage at a local path or fsspec URL; nothing is created yet.

        Raises:
            RuntimeSetupError: no package here reads that kind of URL.
        """
        if isinstance(place, Path) or "://" not in place:
            return LocalStorage(Path(place))
        if place.startswith(("file://", "local://")):
            return LocalStorage(Path(place.split("://", 1)[1]))
        return UrlStorage(place)

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


class UrlStorage(Storage):
    """A place that fsspec accesses. The errors of its libraries have no common base class."""

    failures = (Exception,)

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._fs, path = url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            known = ", ".join(sorted(fsspec.available_protocols()))
            raise RuntimeSetupError(
                f"{url} cannot be used as a place for checkpoints: {error}. Install the package "
                f"that it names (gcsfs for gs://, s3fs for s3://). Kinds known: {known}."
            ) from error
        self._path = path.rstrip("/")

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def describe(self, name: str = "") -> str:
        return f"{self.url}/{name}" if name else self.url

    def names(self) -> list[str]:
        with self.telling(f"Reading {self.url}"):
            self._fs.invalidate_cache()
            try:
                entries = self._fs.ls(self._path, detail=False)
            except FileNotFoundError:
                return []
            names = {str(entry).rstrip("/").removeprefix(self._path) for entry in entries}
            return sorted(name.strip("/") for name in names if name.strip("/"))

    def size(self, name: str) -> int | None:
        with self.telling(f"Looking at {self.describe(name)}"):
            self._fs.invalidate_cache()
            try:
                info = self._fs.info(self._at(name))
            except FileNotFoundError:
                return None
            return int(info["size"]) if info["type"] == "file" else None

    def open(self, name: str) -> BinaryIO:
        with self.telling(f"Reading {self.describe(name)}"):
            return self._fs.open(self._at(name), "rb")

    def open_to_write(self, name: str) -> BinaryIO:
        """Open a file for writing; it appears when it is closed."""
        self._make_parent(self._at(name))
        return self._fs.open(self._at(name), "wb", block_size=PIECE)

    def _make_parent(self, path: str) -> None:
        """Make the parent folder, except in object stores: they have no folders, and a mistyped
        name would create a bucket."""
        protocol = self._fs.protocol
        if not OBJECT_STORES & set([protocol] if isinstance(protocol, str) else protocol):
            self._fs.makedirs(path.rpartition("/")[0], exist_ok=True)

    def write_bytes(self, name: str, data: bytes) -> None:
        with self.telling(f"Writing {self.describe(name)}"):
            self._make_parent(self._at(name))
            self._fs.pipe_file(self._at(name), data)

    @contextmanager
    def _folder(self, name: str, hasher: Executor, main: bool) -> Iterator[FolderWriter]:
        if main:
            self.remove(name)
        yield _UrlFolderWriter(self, name, hasher)

    def remove(self, folder_name: str) -> None:
        with self.telling(f"Removing {self.describe(folder_name)}"):
            self._fs.invalidate_cache()
            for path in (self._at(f"{folder_name}/{MANIFEST}"), self._at(folder_name)):
                if self._fs.exists(path):
                    self._fs.rm(path, recursive=True)

    def remove_file(self, name: str) -> None:
        if self.exists(name):
            with self.telling(f"Removing {self.describe(name)}"):
                self._fs.rm_file(self._at(name))

    def rename(self, folder_name: str, new_name: str) -> None:
        old, new = self._at(folder_name), self._at(new_name)
        with self.telling(f"Renaming {self.describe(folder_name)}"):
            self._fs.invalidate_cache()
            # The manifest is copied last and removed first: never two incomplete folders.
            for path in sorted(self._fs.find(old), key=lambda path: path.endswith(f"/{MANIFEST}")):
                target = new + path.removeprefix(old)
                self._make_parent(target)
                self._fs.cp_file(path, target)
        self.remove(folder_name)

    def leftovers(self) -> list[str]:
        folders = [name for name in self.names() if self.size(name) is None]
        return [name for name in folders if not self.exists(f"{name}/{MANIFEST}")]

    def free_bytes(self) -> int | None:
        return None

    def files(self) -> list[str]:
        """Return the names of the files in this folder and one folder deeper, where all files
        are."""
        with self.telling(f"Reading {self.url}"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._path, maxdepth=2)
            except FileNotFoundError:
                return []
            return sorted(str(path).removeprefix(self._path).strip("/") for path in found)

    def send(self, path: Path, name: str) -> None:
        """Upload a local file to `name`."""
        with self.telling(f"Sending {path} to {self.describe(name)}"):
            self._make_parent(self._at(name))
            self._fs.put_file(str(path), self._at(name))

    @contextmanager
    def mark(self) -> Iterator[str]:
        """Write a small temporary file and return its name."""
        name = f"{PROBE}{secrets.token_hex(8)}"
        with self._probing():
            self.write_bytes(name, b"torchprime")
            if self.read_bytes(name) != b"torchprime":
                raise CheckpointError(f"{self.describe(name)} is not what was written.")
        try:
            yield name
        finally:
            with self._probing():
                self.remove_file(name)

    def sees(self, mark: str) -> bool:
        """Return True if another process's mark exists here."""
        with self._probing():
            return self.exists(mark)

    @contextmanager
    def _probing(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError as error:
            scheme = self.url.partition("://")[0]
            raise CheckpointError(
                f"{self.url} can't be used: a small file has to be written, read back and removed "
                f"there. {error} {CREDENTIALS.get(scheme, 'Check the address and your rights.')}"
            ) from error


def existing_part(path: Path) -> Path:
    """Return the path itself if it exists, else its nearest existing parent."""
    path = path.absolute()
    return next(place for place in (path, *path.parents) if place.exists())


def _files_under(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())
