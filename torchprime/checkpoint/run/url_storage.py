"""Storage of checkpoints at any place that fsspec knows (gs://, s3://, memory://).

Object stores can't rename, so the manifest decides: it is written last and deleted first, and a
folder without one does not exist.
"""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import fsspec
from fsspec.core import url_to_fs

from torchprime.checkpoint.run.hashing_file import PIECE
from torchprime.checkpoint.run.storage import MANIFEST, PROBE, FolderWriter, Storage, files_under
from torchprime.errors import CheckpointError, RuntimeSetupError
from torchprime.files.atomic import open_regular

OBJECT_STORES = {"abfs", "abfss", "adl", "az", "gcs", "gs", "hf", "oss", "s3", "s3a"}
_GOOGLE = (
    "Check the bucket's name. `gcloud auth application-default login` gives this user credentials; "
    "a Cloud VM needs the scope cloud-platform and the role Storage Object Admin."
)
_AMAZON = (
    "Check the bucket's name, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE), and "
    "AWS_ENDPOINT_URL for another S3-compatible store."
)
CREDENTIALS = {"gs": _GOOGLE, "gcs": _GOOGLE, "s3": _AMAZON, "s3a": _AMAZON}


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
            for path in files_under(folder):
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
