"""Folders that appear whole or not at all: written beside their place, synced, renamed into it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torchprime.errors import CheckpointError


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
            _sync(path)
        partial.chmod(0o755)
        _sync(partial)
        refuse_used_folder(out)
        os.rename(partial, out)
        _sync(out.parent)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Ask the system to have this file's bytes, or this folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
