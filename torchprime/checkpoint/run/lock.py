"""The lock that lets one process at a time write into a run's folder.

The lock is the operating system's (flock), so it ends with the process in every case. The file's
content is for people; no decision depends on it, nor on any clock.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from torchprime.errors import RuntimeSetupError
from torchprime.files.atomic import open_plain
from torchprime.text.visible import clean

LOCK = ".lock"
MOST_BYTES = 4096  # size limit of the file's content
_held: set[int] = set()


def _let_go() -> None:
    """Close a forked child's copy of the lock, which would outlive its killed parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def run_lock(
    folder: Path,
    key: str = "output_dir",
    another: str = "give this one its own name (run_name=NAME)",
) -> Iterator[None]:
    """Hold the folder's lock. The operating system releases it when the process ends.

    Args:
        key: names the config's key or the command's argument in messages.
        another: what a user can do instead of waiting for the lock.

    Raises:
        RuntimeSetupError: another process holds it, or the folder can't be written.
    """
    path, mine = folder / LOCK, os.getpid()
    try:
        descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        if os.path.lexists(path) and not _is_plain(path):
            raise RuntimeSetupError(
                f"{key}: {path} is not a file of this run ({error.strerror}): it is a link, "
                "or has a second name. Remove it, once you know who put it there."
            ) from error
        raise RuntimeSetupError(
            f"{key}: {folder} can't be written ({error.strerror}). Make it writable, or set "
            f"{key} to a folder that is."
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise RuntimeSetupError(
                f"{folder} is in use by {_holder(descriptor)}. Wait for that run or stop it; or "
                f"{another}."
            ) from error
        except OSError as error:
            raise RuntimeSetupError(
                f"{key}: the file system of {folder} has no locks ({error.strerror}), and two "
                f"runs in one folder would destroy each other. Set {key} to a local folder; "
                "checkpoints can go elsewhere (checkpoint.folder)."
            ) from error
        os.ftruncate(descriptor, 0)
        since = datetime.now(UTC).isoformat(timespec="seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
        _held.add(descriptor)
        yield
    finally:
        if os.getpid() == mine:
            os.close(descriptor)
            _held.discard(descriptor)


def _is_plain(path: Path) -> bool:
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1


def _holder(descriptor: int) -> str:
    try:
        held = json.loads(os.pread(descriptor, MOST_BYTES, 0))
        return clean(f"process {held['pid']} on {held['host']} since {held['since']}")
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
