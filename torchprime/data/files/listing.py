"""The files of a path: a file, a folder, a glob, or a data set saved by `save_to_disk`.

The files are in reading order, each with the splits that its name gives (splits.py). Metadata files
beside rows are never read as rows.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import fsspec

from torchprime.data.files.readers import EXTENSIONS, known_formats, split_name
from torchprime.data.files.splits import splits_of, splits_of_file
from torchprime.data.files.streams import only_os_errors
from torchprime.errors import DataError
from torchprime.files.atomic import open_regular

GLOB_MARK = re.compile(r"[*?\[]")
HIDDEN = re.compile(r"(^|/)(\.|__[^/]*/)")  # and __MACOSX/
STATE, SPLITS = "state.json", "dataset_dict.json"  # of save_to_disk
# Files of the datasets library and the hub that may lie beside rows.
METADATA = re.compile(
    r"(state|dataset_dict|dataset_infos?|config)\.json|(README|LICEN[CS]E).*|readme\.md"
)


@dataclass(frozen=True)
class SourceFile:
    """One file to read, and its path below the folder or below a glob's part before the first *."""

    name: str
    fs: fsspec.AbstractFileSystem
    path: str

    def open(self) -> IO[bytes]:
        """Open the file for reading.

        Raises:
            OSError: the file cannot be opened, or is a pipe or a device, which may never end.
        """
        if "file" in protocols(self.fs):
            return open_regular(Path(self.path))
        with only_os_errors():
            return cast("IO[bytes]", self.fs.open(self.path, "rb"))


@dataclass(frozen=True)
class FoundFiles:
    """The files of a path in reading order, each with the splits that its name gives.

    Attributes:
        kind: file, folder, glob or saved: one `Dataset.save_to_disk`, a whole without splits.
        named: the split that the path itself names, for a file or a saved data set.
    """

    kind: str
    files: list[tuple[SourceFile, set[str]]]
    named: set[str]


def find_files(path: str, given: str) -> FoundFiles:
    """Find the files of a path; any error of a remote store becomes a user error.

    A name that contains glob characters and exists is read as that file.

    Args:
        given: the config's key with the path, for messages.
    """
    try:
        fs, inner = fsspec.core.url_to_fs(path)
        kind = _kind_of(fs, inner)
        if kind == "directory":
            found = _files_in_folder(fs, inner, given)
        elif kind is None and GLOB_MARK.search(inner):
            found = FoundFiles("glob", _with_splits(_files_of_glob(fs, inner)), set())
        else:
            file = SourceFile(_base_name(fs, inner), fs, inner)
            found = FoundFiles("file", [(file, set())], splits_of_file(inner))
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{given} needs a package that is not installed: {error}") from error
    except Exception as error:
        raise DataError(f"cannot reach {given}: {type(error).__name__}: {error}") from error
    if kind is None and found.kind == "file":
        raise DataError(f"{given} does not exist{_nearest_name(fs, inner)}")
    if found.kind == "folder" and not found.files:
        raise DataError(
            f"{given} is a folder without a file of a known format: {known_formats()}. Give the "
            f"file itself, or a glob such as {path.rstrip('/')}/*.txt, to have it read as JSON"
        )
    if found.kind == "glob" and not found.files:
        raise DataError(
            f"{given} matches no file. Check the pattern: * stays in one folder, ** goes deeper"
        )
    return found


def protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    """Return all names of a store's protocol."""
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _kind_of(fs: fsspec.AbstractFileSystem, inner: str) -> str | None:
    """Return file, directory or None (missing). isdir would download a whole file over http."""
    try:
        return str(fs.info(inner)["type"])
    except (FileNotFoundError, NotADirectoryError):
        return None


def _base_name(fs: fsspec.AbstractFileSystem, inner: str) -> str:
    if "http" in protocols(fs):
        inner = inner.split("?", 1)[0]
    return inner.rstrip("/").rsplit("/", 1)[-1]


def _files_of_glob(fs: fsspec.AbstractFileSystem, pattern: str) -> list[SourceFile]:
    before = GLOB_MARK.split(pattern, maxsplit=1)[0]
    matches = cast("dict[str, dict[str, Any]]", fs.glob(pattern, detail=True))
    paths = [path for path, info in matches.items() if info["type"] != "directory"]
    files = _below(before.rpartition("/")[0], fs, paths)
    return [file for file in files if not _is_metadata(file)]


def _below(root: str, fs: fsspec.AbstractFileSystem, paths: list[str]) -> list[SourceFile]:
    """Return the files with their names below the root, sorted, without hidden ones."""
    files = [SourceFile(path.removeprefix(root).lstrip("/"), fs, path) for path in paths]
    visible = [file for file in files if not HIDDEN.search(file.name)]
    return sorted(visible, key=lambda file: file.name)


def _is_metadata(file: SourceFile) -> bool:
    return METADATA.fullmatch(file.name.rsplit("/", 1)[-1]) is not None


def _with_splits(files: Sequence[SourceFile]) -> list[tuple[SourceFile, set[str]]]:
    return list(zip(files, splits_of([file.name for file in files]), strict=True))


def _nearest_name(fs: fsspec.AbstractFileSystem, inner: str) -> str:
    """Return the end of "does not exist": the closest name beside it, or the missing folder."""
    folder, _, name = inner.rpartition("/")
    try:
        names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(folder, detail=False)]
    except Exception:
        return f": there is no folder {folder}. Check the path"
    close = difflib.get_close_matches(name, sorted(names), n=1, cutoff=0.5)
    if close:
        return f". Did you mean {close[0]}, in the same folder {folder}?"
    return f": the folder {folder} has no such file. Check the path"


# Folders ----------------------------------------------------------------------------------------


def _files_in_folder(fs: fsspec.AbstractFileSystem, root: str, given: str) -> FoundFiles:
    # By default a subfolder that cannot be listed is left out. Not every remote store has this
    # option.
    options: dict[str, Any] = {"on_error": "raise"} if "file" in protocols(fs) else {}
    below = _below(root, fs, list(fs.find(root, **options)))
    rows = [f for f in below if split_name(f.name)[0] in EXTENSIONS and not _is_metadata(f)]
    said: dict[str, Mapping[str, Any]] = {
        file.name: _json_object(file, given)
        for file in below
        if file.name.rpartition("/")[2] in (STATE, SPLITS)
    }
    for name, state in said.items():
        if name.rpartition("/")[2] == STATE and "_data_files" in state:
            rows = _as_listed(rows, name.rpartition("/")[0], state, given)
    if "_data_files" in said.get(STATE, {}):
        split = said[STATE].get("_split")
        return FoundFiles("saved", [(file, set()) for file in rows], {str(split)})
    if SPLITS in said:
        splits = set(map(str, said[SPLITS].get("splits") or ()))
        return FoundFiles("folder", [(f, splits & {f.name.split("/")[0]}) for f in rows], set())
    return FoundFiles("folder", _with_splits(rows), set())


def is_saved_folder(path: str) -> bool:
    """Return True for a local folder that `save_to_disk` wrote."""
    folder = Path(path).expanduser()
    return any((folder / name).is_file() for name in (STATE, SPLITS))


def _json_object(file: SourceFile, given: str) -> Mapping[str, Any]:
    with file.open() as handle:
        try:
            value = json.load(handle)
        except ValueError as error:
            raise DataError(f"{given}: {file.name} is not JSON: {error}. Save it again") from None
    return value if isinstance(value, dict) else {}


def _as_listed(
    files: list[SourceFile], folder: str, state: Mapping[str, Any], given: str
) -> list[SourceFile]:
    """Return the files of saved folders in the order of their state.json, without other files.

    Other files in such a folder are not rows: the library keeps its cache beside its data.
    """
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise DataError(
            f"{given}: the data set in {folder or 'this folder'} was saved with a list of chosen "
            f"rows beside its files (select or shuffle), which is not read. Call "
            f"flatten_indices() before save_to_disk, with the version of datasets that wrote it"
        )
    here = {file.name: file for file in files if file.name.rpartition("/")[0] == folder}
    names = [f"{folder}/{each['filename']}".lstrip("/") for each in state["_data_files"]]
    absent = [name for name in names if name not in here]
    if absent:
        raise DataError(
            f"{given}: a {STATE} lists {', '.join(absent)}, which is not there. Copy the whole "
            f"folder, or save it again"
        )
    place = next((i for i, file in enumerate(files) if file.name in here), len(files))
    rest = [file for file in files if file.name not in here]
    return [*rest[:place], *(here[name] for name in names), *rest[place:]]
