"""Where rows come from: a JSON Lines or JSON file (any fsspec URL), or a dataset on the hub.

Both end in the same stream of (row_id, row). A row_id is what a person needs to find the record
again: `train.jsonl:17` is line 17, `data.json#17` item 17 of an array, `openai/gsm8k:train:17` row
17 of a hub split; all count from 1. Files are read line by line. What cannot be read is a
`DataError` at once: a missing file or an unreachable hub is never retried for long.
"""

from __future__ import annotations

import difflib
import json
import os
import ssl
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from torchprime.errors import DataError

HUB_PROBE_SECONDS = 5.0
UTF8_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceSpec:
    """Which rows to read; the fields are the keys of the config's dataset and eval sections."""

    file_dataset_path: str | None = None
    hf_dataset_name: str | None = None
    hf_dataset_config_name: str | None = None
    split: str = "train"
    cache_dir: str | None = None

    def describe(self) -> str:
        if self.file_dataset_path:
            return self.file_dataset_path
        config = f"/{self.hf_dataset_config_name}" if self.hf_dataset_config_name else ""
        return f"{self.hf_dataset_name}{config}:{self.split}"


def read_rows(source: SourceSpec, section: str = "dataset") -> Iterator[tuple[str, dict[str, Any]]]:
    """Stream (row_id, row) in file order; `section` is the config section named in messages."""
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
    rows = _read_file(path, section) if path else _read_hub(source, section)
    return _refuse_empty(rows, source, section)


def _refuse_empty(
    rows: Iterator[tuple[str, dict[str, Any]]], source: SourceSpec, section: str
) -> Iterator[tuple[str, dict[str, Any]]]:
    first = next(rows, None)
    if first is None:
        key = "file_dataset_path" if source.file_dataset_path else "hf_dataset_name"
        raise DataError(
            f"the dataset {source.describe()} ({section}.{key}) is empty: it has 0 rows, expected "
            f"at least one JSON object"
        )
    yield from chain([first], rows)


# Files ------------------------------------------------------------------------------------------


def _read_file(path: str, section: str) -> Iterator[tuple[str, dict[str, Any]]]:
    open_file = _find_file(path, section)
    name = path.rstrip("/").rsplit("/", 1)[-1]
    try:
        with open_file as handle:
            stream = cast("IO[bytes]", handle)
            if ".jsonl" not in name and _starts_with_bracket(stream):
                yield from _read_array(stream, name)
            else:
                yield from _read_lines(stream, name)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"cannot read {section}.file_dataset_path={path}: {type(error).__name__}: {error}"
        ) from error


def _find_file(path: str, section: str) -> fsspec.core.OpenFile:
    """An existing file, ready to open; a remote store may raise anything, all of it the user's."""
    given = f"{section}.file_dataset_path={path}"
    try:
        fs, inner = fsspec.core.url_to_fs(path)
        exists, is_folder = fs.exists(inner), fs.isdir(inner)
    except ImportError as error:
        raise DataError(f"{given} needs a package that is not installed: {error}") from error
    except Exception as error:
        raise DataError(f"cannot reach {given}: {type(error).__name__}: {error}") from error
    if is_folder:
        raise DataError(f"{given} is a folder, expected one .jsonl or .json file")
    if not exists:
        raise DataError(f"{given} does not exist{_nearest_name(fs, inner)}")
    return cast("fsspec.core.OpenFile", fsspec.open(path, "rb", compression="infer"))


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


def _starts_with_bracket(stream: IO[bytes]) -> bool:
    """A JSON array rather than JSON Lines; the stream is put back to its start."""
    head = stream.read(4096).removeprefix(UTF8_BOM).lstrip()
    stream.seek(0)
    return head.startswith(b"[")


def _read_lines(stream: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, raw in enumerate(stream, start=1):
        if number == 1:
            raw = raw.removeprefix(UTF8_BOM)
        if not raw.strip():
            continue
        row_id = f"{name}:{number}"
        yield row_id, _as_object(_parse(raw, row_id), row_id)


def _read_array(stream: IO[bytes], name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    items = _parse(stream.read().removeprefix(UTF8_BOM), name)
    for number, item in enumerate(items, start=1):
        row_id = f"{name}#{number}"
        yield row_id, _as_object(item, row_id)


def _parse(raw: bytes, where: str) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: not valid UTF-8 at byte {error.start + 1} "
            f"(0x{raw[error.start]:02x}: {error.reason}). Save the file as UTF-8"
        ) from None
    except json.JSONDecodeError as error:
        at = (
            f"line {error.lineno}, column {error.colno}"
            if error.lineno > 1
            else (f"column {error.colno}")
        )
        raise DataError(
            f"{where}: malformed JSON: {error.msg} at {at}. Expected one JSON object per line "
            f"(.jsonl) or one array of objects (.json)"
        ) from None
    except (ValueError, RecursionError) as error:  # numbers or nesting beyond the parser's limits
        raise DataError(f"{where}: JSON that cannot be read: {error}") from None


def _as_object(value: Any, row_id: str) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
    raise DataError(
        f'{row_id}: the row is {kind}, expected a JSON object such as {{"prompt": ..., '
        f'"completion": ...}}'
    )


# The hub ----------------------------------------------------------------------------------------


def _read_hub(source: SourceSpec, section: str) -> Iterator[tuple[str, dict[str, Any]]]:
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
    for number, row in enumerate(cast("datasets.Dataset", loaded), start=1):
        yield f"{name}:{source.split}:{number}", cast("dict[str, Any]", row)


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
