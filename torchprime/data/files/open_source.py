"""The sources of rows: files of many kinds (any fsspec URL), or a dataset on the hub.

A path is a file, a folder or a glob (listing.py). Its files of the requested split are read
(splits.py); readers.py handles the formats, and hub.py loads datasets from the hub. Each source
gives a stream of (row_id, record). A row_id lets a person find the record again: `train.jsonl:17`
is line 17, `data.json#17` item 17 of an array, `sub/a.parquet#17` row 17 of a file in a folder,
`openai/gsm8k:train:17` row 17 of a hub split; all count from 1. A record is a dict, or a
`Rejection` for the caller to count. A source that cannot be read at all, such as a missing file or
an unreachable hub, is a `DataError` at once, without long retries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from typing import Any

from torchprime.config.sections.dataset import DatasetConfig
from torchprime.data.files.hub import load_hub, read_hub
from torchprime.data.files.listing import SourceFile, find_files, is_saved_folder, protocols
from torchprime.data.files.readers import DELIMITERS, LINE_EXTENSIONS, read_records, split_name
from torchprime.data.files.record import Records
from torchprime.data.files.source import SourceSpec
from torchprime.data.files.splits import SplitKey, choose_split, unused_split
from torchprime.data.files.streams import only_os_errors
from torchprime.data.shared.notes import RowNotes
from torchprime.errors import DataError

HASH_BYTES = 2**20  # per file at a time


def read_rows(source: SourceSpec, notes: RowNotes | None = None) -> Records:
    """Stream (row_id, record) in order; a record is a dict, or a Rejection with the same row_id.

    `notes` counts findings in the records while they stream. Raises DataError for a source that is
    missing, unreachable, structurally broken or without a single row.
    """
    rows = _read_files if _path_of(source) else _read_hub
    return _refuse_empty(rows(source, notes), source)


def source_fingerprint(source: SourceSpec) -> str:
    """Return a hex digest of everything the rows and their ids depend on.

    Files: the names below the path and the content of the files read; on a remote store, which
    would have to send all content, its version metadata instead. Hub: name, config, split and the
    fingerprint of the loaded dataset. Raises DataError as read_rows does.
    """
    parts: list[Any] = []
    if path := _path_of(source):
        for file in _files_of(source)[0]:
            with _file_errors(file, path):
                parts.append([file.name, _content_mark(file)])
    else:
        name, config = source.hf_dataset_name, source.hf_dataset_config_name
        parts = [name, config, source.split, load_hub(source)._fingerprint]
    return _digest(json.dumps([source.name, parts]).encode()).hexdigest()


def _refuse_empty(rows: Records, source: SourceSpec) -> Records:
    first = next(rows, None)
    if first is None:
        key = "file_dataset_path" if source.file_dataset_path else "hf_dataset_name"
        raise DataError(
            f"the dataset {source.describe()} ({source.section}.{key}) is empty: it has 0 rows, "
            f"expected at least one JSON object"
        )
    yield from chain([first], rows)


def _read_hub(source: SourceSpec, notes: RowNotes | None) -> Records:
    loaded = load_hub(source)
    yield from read_hub(loaded, source.label(f"{source.hf_dataset_name}:{source.split}"), notes)


# Files ------------------------------------------------------------------------------------------


def _path_of(source: SourceSpec) -> str | None:
    """Return the config's key and path if files are read; a hub name may be a saved folder."""
    section = source.section
    if source.file_dataset_path:
        return f"{section}.file_dataset_path={source.file_dataset_path}"
    name, config = str(source.hf_dataset_name), source.hf_dataset_config_name
    if not is_saved_folder(name):
        return None
    if config is not None:
        raise DataError(
            f"{section}.hf_dataset_config_name={config} is set, but {name} is a folder of "
            f"save_to_disk, which has no configurations. Set {section}.hf_dataset_config_name=null"
        )
    return f"{section}.hf_dataset_name={name}"


def _files_of(source: SourceSpec) -> tuple[list[SourceFile], SplitKey]:
    """Return the files of the split, and the split to select inside each of them.

    Raises DataError for a split that selects nothing or that none of the files has.
    """
    given = str(_path_of(source))
    found = find_files(str(source.file_dataset_path or source.hf_dataset_name), given)
    unset = "null" if source.section == "eval" else DatasetConfig.split
    part = f".mixture.{source.name}" if source.name else ""
    key = f"{source.section}{part}.split"
    wanted = SplitKey(source.split, key, unset)
    files = choose_split(found.files, wanted, given, may_be_only=found.kind == "glob")
    named = any(splits for _, splits in found.files) or source.split in found.named
    if found.kind == "saved" and wanted.asks and not named:
        raise unused_split(wanted, f"{given} is one saved data set, which")
    return files, replace(wanted, is_used=named)


def _read_files(source: SourceSpec, notes: RowNotes | None) -> Records:
    given = str(_path_of(source))
    files, wanted = _files_of(source)
    for file in files:
        with _file_errors(file, given):
            yield from read_records(source.label(file.name), file.open, wanted, notes)


@contextmanager
def _file_errors(file: SourceFile, given: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        inside = "" if given.endswith(file.name) else f" ({file.name})"
        kind = "" if type(error) is OSError else f"{type(error).__name__}: "
        raise DataError(f"cannot read {given}{inside}: {kind}{error}") from error


def expected_rows(source: SourceSpec) -> int | None:
    """Estimate the number of rows from the files' sizes and first lines, for a progress bar.

    Return None for files that would have to be read: compressed, JSON arrays, Parquet, Arrow, the
    hub.
    """
    if not source.file_dataset_path:
        return None
    total = 0.0
    for file in _files_of(source)[0]:
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


def _content_mark(file: SourceFile) -> str:
    """Return a digest of the content, or of remote metadata that changes with it."""
    if not {"file", "memory"} & set(protocols(file.fs)):
        return _version_mark(file)
    digest = _digest()
    with file.open() as handle:
        while piece := handle.read(HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _version_mark(file: SourceFile) -> str:
    with only_os_errors():
        info = file.fs.info(file.path)
        # Over http the key is only the address.
        seen = [file.fs.ukey(file.path), info.get("size"), info.get("ETag")]
    return json.dumps(seen, default=str)


def _digest(start: bytes = b"") -> Any:
    return hashlib.blake2b(start, digest_size=32)
