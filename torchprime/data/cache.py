"""Prepared data sets on disk, each under a hash of everything that shaped it.

A preparation is written into a folder of another name and renamed when it is whole, its manifest
last: what has the final name can be trusted, and what a killed process leaves behind is removed by
the next one. Two processes that prepare the same thing do it twice and keep one.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torchprime.atomic import sync, write_text

MANIFEST = "manifest.json"
PARTIAL = ".partial-"


def default_folder() -> Path:
    """Where prepared data lies unless dataset.prepared_dir says otherwise."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "torchprime" / "prepared"


def cache_key(ingredients: Mapping[str, Any]) -> str:
    """A hash over a JSON-able description of all that shapes the result."""
    text = json.dumps(ingredients, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def find(root: Path, key: str) -> Path | None:
    """The folder prepared under this key, if it is whole: every file there with its size."""
    folder = root / key
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        sizes = {name: (folder / name).stat().st_size for name in manifest["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return folder if sizes == manifest["files"] else None


def build(
    root: Path, key: str, ingredients: Mapping[str, Any], write: Callable[[Path], None]
) -> Path:
    """Let `write` fill a folder, then give it its name.

    Raises:
        OSError: the folder can't be written; nothing is left behind.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_left_behind(root)
    final = root / key
    partial = root / f"{key}{PARTIAL}{socket.gethostname()}-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        write(partial)
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        for path in files:
            sync(path)
        sizes = {path.relative_to(partial).as_posix(): path.stat().st_size for path in files}
        manifest = {"key": key, "ingredients": dict(ingredients), "files": sizes}
        write_text(partial / MANIFEST, json.dumps(manifest, indent=2))
        if final.exists() and find(root, key) is None:
            shutil.rmtree(final)  # somebody damaged it
        try:
            partial.rename(final)
        except OSError:
            if find(root, key) is None:
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def _remove_left_behind(root: Path) -> None:
    """Unfinished folders of processes of this host that no longer run."""
    for path in root.glob(f"*{PARTIAL}*"):
        host, _, pid = path.name.rpartition(PARTIAL)[2].rpartition("-")
        if host == socket.gethostname() and pid.isdigit() and not _runs(int(pid)):
            shutil.rmtree(path, ignore_errors=True)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
