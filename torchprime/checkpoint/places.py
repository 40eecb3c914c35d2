"""The target of an export: a local folder or a URL. The export appears there whole or not at all.

A local folder is written under a temporary name and renamed. Object stores can't rename, so an
export to a URL is first made and checked locally and then uploaded, file by file. Each file is read
back and must have the certificate's hash. `certificate.json` is uploaded last: a URL without one
holds no export. During the upload a file `.incomplete` lists the files that belong to it, so that
the next attempt may remove what a killed process left.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from torchprime.checkpoint.proof.certificate import (
    CERTIFICATE,
    Certificate,
    hash_folder,
    read_certificate,
)
from torchprime.checkpoint.run.local_storage import LocalStorage, existing_part
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.storage import FORBIDDEN, FULL
from torchprime.checkpoint.run.url_storage import UrlStorage
from torchprime.errors import CheckpointError
from torchprime.files.atomic import atomic_folder, refuse_used_folder
from torchprime.files.foreign_names import path_fault_of
from torchprime.files.hashing import FileFacts, hash_file, sha256_of

INCOMPLETE = ".incomplete"
# Without one of these no reader recognizes the folder as a model or an adapter.
CONFIGS = ("config.json", "adapter_config.json")
SENDERS = 4  # files that are uploaded at the same time


class UnsentError(CheckpointError):
    """Error for an export that is whole locally but could not be uploaded; the message gives the
    command."""


class ExportPlace(ABC):
    """A target of an export."""

    local: Path  # local folder from which the files can be read after they are written

    @staticmethod
    def of(place: str | Path | ExportPlace, scratch: Path | None = None) -> ExportPlace:
        """Return the place at a path or URL.

        Args:
            scratch: the folder in which an export to a URL is made, kept if sending it fails; None
                for a temporary one.
        """
        if isinstance(place, ExportPlace):
            return place
        storage = open_storage(place)
        if isinstance(storage, UrlStorage):
            return UrlPlace(storage, scratch)
        assert isinstance(storage, LocalStorage)
        return LocalPlace(storage.root)

    @abstractmethod
    def __str__(self) -> str:
        """Return the path or URL, for messages."""

    @abstractmethod
    def is_there(self) -> bool:
        """Return True if a whole export exists."""

    @abstractmethod
    def certificate(self) -> Certificate | None:
        """Return the existing certificate, or None."""

    @abstractmethod
    def require_new(self) -> None:
        """Raise a CheckpointError if the target already exists."""

    @abstractmethod
    def probe(self) -> None:
        """Raise a CheckpointError if the target is not writable."""

    @property
    @abstractmethod
    def disk(self) -> Path:
        """The folder whose disk must have room for the export."""

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """Yield a local folder to write into; on exit it becomes the export.

        Raises:
            CheckpointError: something is there already, or it could not be written or sent.
        """
        try:
            with self._folder() as folder:
                yield folder
        except OSError as error:
            raise CheckpointError(f"The export to {self} failed: {self._advice(error)}") from error

    def _advice(self, error: OSError) -> str:
        other = "give another place (task.export_checkpoint_path, --out)"
        if error.errno in FULL:
            free = shutil.disk_usage(existing_part(self.disk)).free / 1e9
            return f"no space ({free:.2f} GB left at {self.disk}). Free some, or {other}."
        if error.errno in FORBIDDEN:
            return f"{error}. Give this user the right to write there, or {other}."
        return f"{type(error).__name__}: {error}."

    @abstractmethod
    def discard(self) -> None:
        """Remove the local copy that was made only for the upload."""

    @abstractmethod
    @contextmanager
    def _folder(self) -> Iterator[Path]:
        raise NotImplementedError
        yield


class LocalPlace(ExportPlace):
    """A local folder as target."""

    def __init__(self, out: Path) -> None:
        self.local, self._storage = out, LocalStorage(out)

    def __str__(self) -> str:
        return str(self.local)

    def is_there(self) -> bool:
        return self.local.is_dir()

    def certificate(self) -> Certificate | None:
        there = (self.local / CERTIFICATE).is_file()
        return read_certificate(self.local) if there else None

    def require_new(self) -> None:
        refuse_used_folder(self.local)
        absolute = self.local.absolute()
        there = next(p for p in (absolute, *absolute.parents) if os.path.lexists(p))
        if not there.is_dir():
            raise CheckpointError(
                f"The export can't be written to {self.local}: {there} is not a folder. Choose "
                "another place (task.export_checkpoint_path, --out), or remove that."
            )

    def probe(self) -> None:
        try:
            self._storage.probe()
        except CheckpointError as error:
            raise CheckpointError(
                f"The export can't be written to {self.local}: {error} Choose another place "
                "(task.export_checkpoint_path, --out)."
            ) from error

    def discard(self) -> None:
        """Do nothing: the folder is the export."""

    @property
    def disk(self) -> Path:
        return self.local

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        with atomic_folder(self.local) as folder:
            yield folder


class UrlPlace(ExportPlace):
    """A target that fsspec writes to.

    Attributes:
        local: the copy on this machine: there until `discard`, and after a failure.
    """

    def __init__(self, storage: UrlStorage, scratch: Path | None) -> None:
        self._storage, self._kept = storage, scratch is not None
        name = f"torchprime-export-{secrets.token_hex(8)}"
        self.local = scratch or Path(tempfile.gettempdir()) / name

    def __str__(self) -> str:
        return self._storage.describe()

    def is_there(self) -> bool:
        return self._storage.exists(CERTIFICATE)

    def certificate(self) -> Certificate | None:
        if not self.is_there():
            return None
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / CERTIFICATE).write_bytes(self._storage.read_bytes(CERTIFICATE))
            return read_certificate(Path(folder))

    def require_new(self) -> None:
        names = self._storage.files()
        if not names or (INCOMPLETE in names and CERTIFICATE not in names):
            return
        what = f"already holds {len(names)} files ({', '.join(names[:3])}, ...)"
        raise CheckpointError(
            f"{self} {what}; a new export is never mixed with an older one. Choose another place "
            "(task.export_checkpoint_path, --out), or remove this one."
        )

    def probe(self) -> None:
        self._storage.probe()

    @property
    def disk(self) -> Path:
        return self.local

    @contextmanager
    def _folder(self) -> Iterator[Path]:
        self.require_new()
        with atomic_folder(self.local, replace=True) as folder:
            yield folder
        try:
            self.send(self.local)
        except CheckpointError as error:
            if not self._kept:
                raise
            raise UnsentError(
                f"{error}\nThe export is whole, in {self.local}. To send it: "
                f"{shlex.join(['torchprime', 'export', str(self.local), '--out', str(self)])}"
            ) from error
        finally:
            if not self._kept:
                self.discard()

    def discard(self) -> None:
        shutil.rmtree(self.local, ignore_errors=True)

    def send(self, folder: Path) -> None:
        """Upload a whole export; the certificate comes last, after all other files were read back.

        Raises:
            CheckpointError: a file could not be sent, or came back as something else.
        """
        self.require_new()
        self._remove_leftover()
        files = hash_folder(folder)
        certificate = {CERTIFICATE: hash_file(folder / CERTIFICATE)}
        config = {name: files.pop(name) for name in CONFIGS if name in files}
        names = [*files, *config, *certificate]
        self._storage.write_bytes(INCOMPLETE, json.dumps({"files": names}).encode())
        try:
            for part in (files, config, certificate):
                self._send_files(folder, part)
        except BaseException:
            with suppress(CheckpointError):  # report the first error, not one that followed from it
                self._remove_leftover()
            raise
        self._storage.remove_file(INCOMPLETE)

    def _send_files(self, folder: Path, files: Mapping[str, FileFacts]) -> None:
        """Upload several files at a time and read each back."""

        def send(name: str) -> None:
            self._storage.send(folder / name, name)
            self._read_back(name, files[name])

        with ThreadPoolExecutor(SENDERS, thread_name_prefix="send") as pool:
            for sent in [pool.submit(send, name) for name in files]:
                sent.result()

    def _read_back(self, name: str, facts: FileFacts) -> None:
        where = self._storage.describe(name)
        with self._storage.telling(f"Reading {where}"), self._storage.open(name) as file:
            sha256, size = sha256_of(file)
        if (size, sha256) != (facts["bytes"], facts["sha256"]):
            raise CheckpointError(
                f"{where} is not what was sent: {size:,} bytes with sha256 {sha256}, not "
                f"{facts['bytes']:,} with {facts['sha256']}. Send it again."
            )

    def _remove_leftover(self) -> None:
        """Remove the files that `.incomplete` lists, and that file last."""
        if not self._storage.exists(INCOMPLETE) or self.is_there():
            return
        try:
            names = json.loads(self._storage.read_bytes(INCOMPLETE))["files"]
            if not isinstance(names, list):
                raise TypeError(f"files is {type(names).__name__}")
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self._storage.describe(INCOMPLETE)} is not what torchprime writes there. Look "
                f"what {self} holds, and remove it or choose another place."
            ) from error
        for name in names:
            if path_fault_of(name) is None:
                self._storage.remove_file(name)
        self._storage.remove_file(INCOMPLETE)
