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


def write_text(path: Path, text: str) -> None:
    """Write whole or not at all: temporary name, fsync, rename."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


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


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Give a temporary sibling of `out` to write into, and rename it to `out` at the end.

    An exception inside removes what was written; after a kill, the leftover has another name
    (`.NAME.partial`) and the next attempt clears it.
    """
    refuse_used_folder(out)
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in sorted(partial.rglob("*"), reverse=True):
            path.chmod(0o755 if path.is_dir() else 0o644)
            sync(path)
        partial.chmod(0o755)
        sync(partial)
        refuse_used_folder(out)
        os.rename(partial, out)
        sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def sync(path: Path) -> None:
    """Ask the system to have this file's bytes, or this folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
