"""Prepared data sets on disk, each under a hash of everything that shaped it.

A preparation is written into a folder with a temporary name, its manifest last, and renamed when it
is complete. The manifest has the sha256 of every file, and a folder is used only if all hashes
match: changed ids would otherwise be trained under the old fingerprint. The next process removes
the remains of a killed one. Two processes that prepare the same data do it twice and one result is
used.

Hashes detect damage but not forgery, since a forger would change the manifest too. So a folder that
another user may change is refused (files/private_folders.py).
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchprime.files.atomic import (
    FOLDER_MODE,
    make_folder,
    open_regular,
    remove_tree,
    settle,
    write_text,
)
from torchprime.files.hashing import FileFacts, hash_files
from torchprime.files.private_folders import require_private
from torchprime.text import terminal

FORMAT = 2  # of the manifest; part of every key
MANIFEST = "manifest.json"
PARTIAL, DAMAGED = ".partial-", ".damaged"
KEY = "dataset.prepared_dir"
MOST_BYTES = 64 << 20  # of a manifest
# Settings that older keys lack, and the value with which the examples are the same.
LATER: Mapping[str, Any] = {
    "average": "tokens",
    "replay_apart": False,
    "weight_key": None,
}

Stamps = dict[str, tuple[int, ...]]
_checked: dict[Path, Stamps] = {}  # folders whose files were hashed in this process


def default_folder() -> Path:
    """Return the folder for prepared data that is used if dataset.prepared_dir is not set."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "torchprime" / "prepared"


def chosen(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for a key: without a later one whose value changes nothing, so that data
    prepared before it is found."""
    return {name: value for name, value in settings.items() if LATER.get(name, ...) != value}


def cache_key(ingredients: Mapping[str, Any]) -> str:
    """Return a hash of a JSON-able description of everything that shapes the result."""
    text = json.dumps([FORMAT, ingredients], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def find(root: Path, key: str, say: Callable[[str], None] = terminal.say) -> Path | None:
    """Return the folder prepared under this key, if every file in it matches its hash.

    Files are read whole, once per process. A damaged folder is renamed, and `say` gets a message.

    Raises:
        RuntimeSetupError: other users could change the folder.
    """
    folder = root / key
    require_private(root, KEY)
    if not os.path.lexists(folder):
        return None
    require_private(folder, KEY)
    try:
        _check(folder, key)
    except _Damaged as damage:
        _set_aside(folder, str(damage), say)
        return None
    return folder


def build(
    root: Path, key: str, ingredients: Mapping[str, Any], write: Callable[[Path], None]
) -> Path:
    """Let `write` fill a folder, then give it its final name.

    Raises:
        OSError: the folder can't be written; nothing is left behind.
        RuntimeSetupError: other users could change the folder.
    """
    make_folder(root)
    require_private(root, KEY)
    _remove_left_behind(root)
    final = root / key
    partial = root / f"{key}{PARTIAL}{socket.gethostname()}-{os.getpid()}"
    remove_tree(partial)
    partial.mkdir(FOLDER_MODE)
    made = partial.lstat()
    try:
        write(partial)
        manifest = {
            "key": key,
            "ingredients": dict(ingredients),
            "files": hash_files(_files(partial)),
        }
        write_text(partial / MANIFEST, json.dumps(manifest, indent=2))
        settle(partial, made)
        try:
            partial.rename(final)
        except OSError:  # it exists: another process finished first, or it is damaged
            if find(root, key) is None:
                partial.rename(final)
    finally:
        remove_tree(partial)
    return final


# Checking a stored folder -------------------------------------------------------------------------


class _Damaged(Exception):
    """A fault of a prepared folder."""


def _check(folder: Path, key: str) -> None:
    """Raise the fault of a folder, if any; files hashed before are not read again."""
    if folder.is_symlink() or not folder.is_dir():
        raise _Damaged("it is no folder")
    before = _stamps(folder)
    if _checked.get(folder.absolute()) == before:
        return
    expected = _listed(folder, key)
    paths = _files(folder)
    paths.pop(MANIFEST, None)
    for name, path in paths.items():
        if path.is_symlink():
            raise _Damaged(f"{name} is a link")
    for name in sorted(expected.keys() ^ paths.keys()):
        how = "is missing" if name in expected else "was not there when it was written"
        raise _Damaged(f"{name} {how}")
    try:
        found = hash_files(paths)
    except OSError as error:
        raise _Damaged(f"a file cannot be read ({error})") from error
    for name, facts in expected.items():
        if found[name] != facts:
            raise _Damaged(f"{name} is not as it was written (its sha256 differs)")
    _checked[folder.absolute()] = before


def _listed(folder: Path, key: str) -> dict[str, FileFacts]:
    """Return the files that the manifest lists; it must be this folder's manifest."""
    try:
        with open_regular(folder / MANIFEST) as file:
            manifest = json.loads(file.read(MOST_BYTES))
        if manifest["key"] != key:
            raise _Damaged(f"its {MANIFEST} is that of {str(manifest['key'])!r:.40}")
        files = manifest["files"]
        return {n: FileFacts(bytes=f["bytes"], sha256=f["sha256"]) for n, f in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _Damaged(f"its {MANIFEST} cannot be read ({type(error).__name__})") from error


def _files(folder: Path) -> dict[str, Path]:
    """Return every file in a folder, by relative name."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_symlink() or not path.is_dir()
    }


def _stamps(folder: Path) -> Stamps:
    """Return values that change when a file is changed, without reading it."""
    found = {name: os.lstat(path) for name, path in _files(folder).items()}
    return {
        name: (s.st_dev, s.st_ino, s.st_mode, s.st_size, s.st_mtime_ns, s.st_ctime_ns)
        for name, s in found.items()
    }


def _set_aside(folder: Path, damage: str, say: Callable[[str], None]) -> None:
    """Rename a damaged folder; if several processes find it, one renames it and reports it."""
    other = folder.with_name(f"{folder.name}{DAMAGED}")
    remove_tree(other)
    try:
        folder.rename(other)
    except OSError:
        return
    say(f"prepared data {folder}: {damage}; it is now {other.name}, and is prepared again")


def _remove_left_behind(root: Path) -> None:
    """Remove unfinished folders of processes of this host that no longer run."""
    for path in root.glob(f"*{PARTIAL}*"):
        host, _, pid = path.name.rpartition(PARTIAL)[2].rpartition("-")
        if host == socket.gethostname() and pid.isdigit() and not _runs(int(pid)):
            remove_tree(path)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
