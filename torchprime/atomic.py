"""Files and folders that appear whole or not at all: written beside their place, synced, renamed
into it. Runs, exports and prepared data are all written with these.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torchprime.errors import CheckpointError


def write_bytes(path: Path, data: bytes) -> None:
    """Write whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """As write_bytes, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """As write_text; indented, in the key order given, with characters as they are."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def refuse_used_folder(out: Path) -> None:
    """Raise a CheckpointError if something is already at `out`, other than an empty folder."""
    if out.is_dir():
        entries = sorted(entry.name for entry in out.iterdir())
        if not entries:
            return
        what = f"already holds {len(entries)} entries ({', '.join(entries[:3])}, ...)"
    elif out.exists() or out.is_symlink():
        what = "exists and is not a folder"
    else:
        return
    raise CheckpointError(
        f"The target folder {out} {what}; a new checkpoint is never mixed with an older one. "
        "Choose another folder (task.export_checkpoint_path, run_name), or remove this one."
    )


def partial_of(out: Path) -> Path:
    """The name of a folder that is being written."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def atomic_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write into, and rename it to `out` at the end.

    An exception inside removes what was written; after a kill, the leftover has another name
    (`.NAME.partial`) and the next attempt clears it. What is at `out` already is refused, or, with
    `replace`, kept until the new one is whole and removed then.
    """
    if not replace:
        refuse_used_folder(out)
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True):
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync(path)
        partial.chmod(0o755)
        sync(partial)
        if replace:
            _set_aside(out)
        else:
            refuse_used_folder(out)
        os.rename(partial, out)
        sync(out.parent)
        shutil.rmtree(_removed(out), ignore_errors=True)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Remove a folder whole or not at all, if it is there: renamed first, emptied then.

    After a kill in between, what is left has another name (`.NAME.removed`).
    """
    _set_aside(folder)
    shutil.rmtree(_removed(folder), ignore_errors=True)


def _removed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")


def _set_aside(folder: Path) -> None:
    shutil.rmtree(_removed(folder), ignore_errors=True)
    if folder.exists():
        os.rename(folder, _removed(folder))
        sync(folder.parent)


def sync(path: Path) -> None:
    """Ask the system to have this file's bytes, or this folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
