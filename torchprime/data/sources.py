"""Where rows come from: files of many kinds (any fsspec URL), or a dataset on the hub.

A path is a file, a folder (all files of known formats below it) or a glob; readers.py knows the
formats. Everything ends in the same stream of (row_id, record). A row_id is what a person needs to
find the record again: `train.jsonl:17` is line 17, `data.json#17` item 17 of an array,
`sub/a.parquet#17` row 17 of a file in a folder, `openai/gsm8k:train:17` row 17 of a hub split; all
count from 1. A record is a dict, or a `Rejection` for the caller to count. What cannot be read at
all is a `DataError` at once: a missing file or an unreachable hub is never retried for long.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import fsspec

from torchprime.data.notes import RowNotes
from torchprime.data.readers import (
    DELIMITERS,
    EXTENSIONS,
    LINE_EXTENSIONS,
    known_formats,
    read_records,
    split_name,
)
from torchprime.data.records import Records
from torchprime.data.streams import only_os_errors
from torchprime.errors import DataError

if TYPE_CHECKING:
    import datasets

HUB_PROBE_SECONDS = 5.0
HASH_BYTES = 2**20  # of a file at a time
GLOB_MARK = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class SourceSpec:
    """Which rows to read; the fields are the keys of the config's dataset and eval sections.

    `name` is that of a mixture's part; it begins the part's row ids: `replay/train.jsonl:17`.
    """

    file_dataset_path: str | None = None
    hf_dataset_name: str | None = None
    hf_dataset_config_name: str | None = None
    split: str = "train"
    cache_dir: str | None = None
    name: str = ""

    def describe(self) -> str:
        if self.file_dataset_path:
            return self.file_dataset_path
        config = f"/{self.hf_dataset_config_name}" if self.hf_dataset_config_name else ""
        return f"{self.hf_dataset_name}{config}:{self.split}"

    def label(self, inner: str) -> str:
        """What begins a row id: the part's name, if there is one, and the file's or dataset's."""
        return f"{self.name}/{inner}" if self.name else inner


def read_rows(
    source: SourceSpec, section: str = "dataset", notes: RowNotes | None = None
) -> Records:
    """Stream (row_id, record) in order; a record is a dict, or a Rejection with the same row_id.

    `section` is the config section named in messages; `notes` counts what was noticed in the
    records while they stream. Raises DataError: at the call when not
    exactly one place is set; while reading for what is missing, unreachable, structurally broken
    or without a single row.
    """
    _check_one_place(source, section)
    rows = _read_files if source.file_dataset_path else _read_hub
    return _refuse_empty(rows(source, section), source, section)


def source_fingerprint(source: SourceSpec, section: str = "dataset") -> str:
    """A hex digest of everything the rows and their ids depend on.

    Files: their names below the path, and their content; on a remote store, which would have to
    send all of it, what the store says of each version instead. Hub: name, config, split and the
    fingerprint of the loaded dataset. Raises DataError as read_rows does.
    """
    _check_one_place(source, section)
    if source.file_dataset_path:
        path, parts = source.file_dataset_path, []
        for file in _find_files(path, section):
            with _file_errors(file, path, section):
                parts.append([file.name, _content_mark(file)])
    else:
        name, config = source.hf_dataset_name, source.hf_dataset_config_name
        parts = [name, config, source.split, _load_hub(source, section)._fingerprint]
    return _digest(json.dumps([source.name, parts]).encode()).hexdigest()


def _check_one_place(source: SourceSpec, section: str) -> None:
    name, path = source.hf_dataset_name, source.file_dataset_path
    if not name and not path:
        raise DataError(
            f"no rows to read: neither {section}.file_dataset_path nor {section}.hf_dataset_name "
            f"is set. Set one of them, e.g. {section}.file_dataset_path=rows.jsonl"
        )
    if name and path:
        raise DataError(
            f"{section}.file_dataset_path={path} and {section}.hf_dataset_name={name} are both "
            f"set, but rows come from one place. Set one of them to null"
        )


def _refuse_empty(rows: Records, source: SourceSpec, section: str) -> Records:
    first = next(rows, None)
    if first is None:
        key = "file_dataset_path" if source.file_dataset_path else "hf_dataset_name"
        raise DataError(
            f"the dataset {source.describe()} ({section}.{key}) is empty: it has 0 rows, expected "
            f"at least one JSON object"
        )
    yield from chain([first], rows)


# Files ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """One file to read, and its path below the folder or the part of a glob before the first *."""

    name: str
    fs: fsspec.AbstractFileSystem
    path: str

    def open(self) -> IO[bytes]:
        with only_os_errors():
            return cast("IO[bytes]", self.fs.open(self.path, "rb"))


def _read_files(source: SourceSpec, section: str) -> Records:
    path = str(source.file_dataset_path)
    for file in _find_files(path, section):
        with _file_errors(file, path, section):
            yield from read_records(source.label(file.name), file.open, source.split)


@contextmanager
def _file_errors(file: _File, path: str, section: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        inside = "" if path.endswith(file.name) else f" ({file.name})"
        kind = "" if type(error) is OSError else f"{type(error).__name__}: "
        raise DataError(
            f"cannot read {section}.file_dataset_path={path}{inside}: {kind}{error}"
        ) from error


def expected_rows(source: SourceSpec, section: str = "dataset") -> int | None:
    """About how many rows there are, from the files' sizes and first lines: for a progress bar.

    None where that takes reading: compressed files, JSON arrays, Parquet, the hub.
    """
    if not source.file_dataset_path:
        return None
    total = 0.0
    for file in _find_files(source.file_dataset_path, section):
        extension, compression = split_name(file.name)
        if compression or extension not in (*LINE_EXTENSIONS, *DELIMITERS):
            return None
        with file.open() as handle:
            head = handle.read(HASH_BYTES)
        size = file.fs.info(file.path).get("size")
        if size is None or not head:
            return None
        total += size * head.count(b"\n") / len(head)
    return round(total)


def _find_files(path: str, section: str) -> list[_File]:
    """The files of a path, sorted by name; a remote store may raise anything, all of it the user's.

    A name that holds a glob's characters and exists is that file.
    """
    given = f"{section}.file_dataset_path={path}"
    try:
        fs, inner = fsspec.core.url_to_fs(path)
        kind = _kind_of(fs, inner)
        is_glob = kind is None and GLOB_MARK.search(inner)
        if kind == "directory":
            found = _files_in_folder(fs, inner)
        elif is_glob:
            found = _files_of_glob(fs, inner)
        else:
            found = [_File(_base_name(fs, inner), fs, inner)]
    except ImportError as error:
        raise DataError(f"{given} needs a package that is not installed: {error}") from error
    except Exception as error:
        raise DataError(f"cannot reach {given}: {type(error).__name__}: {error}") from error
    if kind == "directory" and not found:
        raise DataError(
            f"{given} is a folder without a file of a known format: {known_formats()}. Give the "
            f"file itself, or a glob such as {path.rstrip('/')}/*.txt, to have it read as JSON"
        )
    if is_glob and not found:
        raise DataError(
            f"{given} matches no file. Check the pattern: * stays in one folder, ** goes deeper"
        )
    if kind is None and not is_glob:
        raise DataError(f"{given} does not exist{_nearest_name(fs, inner)}")
    return sorted(found, key=lambda file: file.name)


def _kind_of(fs: fsspec.AbstractFileSystem, inner: str) -> str | None:
    """file, directory or None: nothing is there. (isdir would download a whole file over http.)"""
    try:
        return str(fs.info(inner)["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def _base_name(fs: fsspec.AbstractFileSystem, inner: str) -> str:
    if "http" in _protocols(fs):
        inner = inner.split("?", 1)[0]
    return inner.rstrip("/").rsplit("/", 1)[-1]


def _files_in_folder(fs: fsspec.AbstractFileSystem, root: str) -> list[_File]:
    # Left alone a subfolder that cannot be listed is left out. Not every remote store takes this.
    options: dict[str, Any] = {"on_error": "raise"} if "file" in _protocols(fs) else {}
    files = _below(root, fs, list(fs.find(root, **options)))
    return [file for file in files if split_name(file.name)[0] in EXTENSIONS]


def _files_of_glob(fs: fsspec.AbstractFileSystem, pattern: str) -> list[_File]:
    before = GLOB_MARK.split(pattern, maxsplit=1)[0]
    matches = cast("dict[str, dict[str, Any]]", fs.glob(pattern, detail=True))
    paths = [path for path, info in matches.items() if info["type"] != "directory"]
    return _below(before.rpartition("/")[0], fs, paths)


def _below(root: str, fs: fsspec.AbstractFileSystem, paths: list[str]) -> list[_File]:
    """Each with its name below the root, without the hidden ones."""
    named = [_File(path.removeprefix(root).lstrip("/"), fs, path) for path in paths]
    return [file for file in named if not re.search(r"(^|/)\.", file.name)]


def _nearest_name(fs: fsspec.AbstractFileSystem, inner: str) -> str:
    """What follows "does not exist": the closest name beside it, or that its folder is missing."""
    folder, _, name = inner.rpartition("/")
    try:
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(folder, detail=False)]
    except Exception:
        return f": there is no folder {folder}. Check the path"
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    if close:
        return f". Did you mean {close[0]}, in the same folder {folder}?"
    return f": the folder {folder} has no such file. Check the path"


def _content_mark(file: _File) -> str:
    """A digest of the content, or of what a remote store says that changes with it."""
    if not {"file", "memory"} & set(_protocols(file.fs)):
        return _version_mark(file)
    digest = _digest()
    with file.open() as handle:
        while piece := handle.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _version_mark(file: _File) -> str:
    with only_os_errors():
        info = file.fs.info(file.path)
        # Over http the key is only the address.
        seen = [file.fs.ukey(file.path), info.get("size"), info.get("ETag")]
    return json.dumps(seen, default=str)


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _digest(start: bytes = b"") -> Any:
    return hashlib.blake2b(start, digest_size=32)


# The hub ----------------------------------------------------------------------------------------


def _read_hub(source: SourceSpec, section: str) -> Records:
    loaded = _load_hub(source, section)
    label = source.label(f"{source.hf_dataset_name}:{source.split}")
    for number, row in enumerate(loaded, start=1):
        yield f"{label}:{number}", cast("dict[str, Any]", row)


def _load_hub(source: SourceSpec, section: str) -> datasets.Dataset:
    # late: it takes more than a second and a run on a file never needs it.
    import datasets
    from datasets.exceptions import DatasetNotFoundError

    name = str(source.hf_dataset_name)
    given = f"{section}.hf_dataset_name={name}"
    try:
        with _no_retries_without_network(name):
            loaded = datasets.load_dataset(
                name,
                source.hf_dataset_config_name,
                split=source.split,
                cache_dir=source.cache_dir,
                streaming=False,
            )
    except DatasetNotFoundError as error:
        raise DataError(
            f"{given}: {error} Check the name; a private dataset needs a login (HF_TOKEN)"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"{given} cannot be loaded: the Hugging Face Hub cannot be reached and the dataset is "
            f"not in the cache. Set {section}.file_dataset_path to a local file "
            f"(and {section}.hf_dataset_name=null), or fix the network{_offline_hint()}"
        ) from error
    except Exception as error:  # a wrong config or split name, a script, a broken file
        raise DataError(
            f"{given} (config {source.hf_dataset_config_name}, split {source.split}) cannot be "
            f"loaded: {type(error).__name__}: {error}. Check {section}.hf_dataset_config_name and "
            f"{section}.split"
        ) from error
    return cast("datasets.Dataset", loaded)


def _offline_hint() -> str:
    asked = [key for key in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(key)]
    return f" ({' and '.join(asked)} is set: unset it to go online)" if asked else ""


@contextmanager
def _no_retries_without_network(name: str) -> Iterator[None]:
    """Look whether the hub answers; when it does not, let the libraries use only their cache.

    Left alone they retry every request with growing pauses, about 25 seconds for a host without
    network, to arrive at the same answer.
    """
    # late: as above
    import datasets.config
    import huggingface_hub.constants

    constants: Any = huggingface_hub.constants
    config: Any = datasets.config
    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    local = Path(name).expanduser().is_dir()
    if not local and not any(before) and not _answers(constants.ENDPOINT):
        constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def _answers(endpoint: str) -> bool:
    """Any answer counts, an HTTP error too; only a connection that fails does not."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=HUB_PROBE_SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        # Certificates are the libraries' business: they may trust others than Python does.
        return isinstance(error.reason, ssl.SSLError)
    except OSError:
        return False
    return True
