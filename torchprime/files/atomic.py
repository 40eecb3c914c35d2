"""Atomic writes: files and folders are written under a temporary name, synced, then renamed.

Runs, exports and prepared data are all written with these functions. No write follows a link that
somebody put in its place: a new file or folder gets a free name, an old one is opened only if it is
a plain file, and a rename replaces a link. Files are readable as the umask allows, and writable
only by their owner.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from torchprime.errors import CheckpointError, RuntimeSetupError

NEW = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
PIECE = 8 * 2**20
SMALL_FILE = 64 * 2**20  # bytes: settings, templates, prompts; tokenizers have some 20 MB
FILE_MODE, FOLDER_MODE = 0o644, 0o755  # minus the bits that the umask removes
TEMPORARY = re.compile(r"\..*\.[0-9a-f]{16}\.tmp")


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: temporary name, fsync, rename."""
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    temporary = f".{path.name[:64]}.{secrets.token_hex(8)}.tmp"
    try:
        with open(os.open(temporary, NEW, FILE_MODE, dir_fd=folder), "wb") as file:
            try:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.rename(temporary, path.name, src_dir_fd=folder, dst_dir_fd=folder)
            except BaseException:
                with suppress(OSError):
                    os.unlink(temporary, dir_fd=folder)
                raise
    finally:
        os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, in UTF-8."""
    write_bytes(path, text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically; indented, in the given key order, without ASCII escapes."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def clear_temporary(folder: Path) -> None:
    """Remove temporary files of killed processes from a folder. Only its one writer may do this."""
    with suppress(OSError):
        for name in os.listdir(folder):
            if TEMPORARY.fullmatch(name):
                os.unlink(folder / name)


def make_folder(path: Path) -> None:
    """Make a folder and its missing parents, writable only by their owner."""
    for place in [*reversed(path.absolute().parents), path]:
        if not place.is_dir():
            place.mkdir(FOLDER_MODE, exist_ok=True)


def open_new(path: Path) -> BinaryIO:
    """Open a new file for writing.

    Raises:
        OSError: the path exists, even as a link.
    """
    return open(os.open(path, NEW, FILE_MODE), "wb")


def open_plain(path: Path, flags: int) -> int:
    """Return a descriptor of a file that only this user owns, made if `flags` say so.

    Raises:
        OSError: the file cannot be opened; or it is a link, no plain file, or a file with a second
            name, whose content would change, too.
    """
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, FILE_MODE)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "it is a link", str(path)) from error
        raise
    found = os.fstat(descriptor)
    if stat.S_ISREG(found.st_mode) and found.st_nlink <= 1:
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EMLINK, "it is not a plain file with one name", str(path))


def read_plain(path: Path) -> str:
    """Return the text of a run's own file, opened with `open_plain`.

    Raises:
        RuntimeSetupError: the file cannot be read, or is no plain file.
    """
    try:
        with open(open_plain(path, os.O_RDONLY), encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RuntimeSetupError(
            f"{path} cannot be read: {reason}. Put back what the run wrote there, or give the run "
            "another name (run_name=NAME)."
        ) from error


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for reading; a pipe or a device might never end.

    Raises:
        OSError: the file cannot be opened, or is no regular file.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    raise OSError(errno.EINVAL, "it is not a regular file", str(path))


def read_regular(path: Path, most: int = SMALL_FILE) -> bytes:
    """Return the content of a file that may come from somebody else.

    Args:
        most: bytes; a longer file is refused before it is read.

    Raises:
        OSError: the file cannot be read, is a pipe or a device, or is longer.
    """
    parts, size = [], 0
    with open_regular(path) as file:
        while size <= most and (part := file.read(min(PIECE, most + 1 - size))):
            parts.append(part)
            size += len(part)
    if size > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return b"".join(parts)


def read_regular_text(path: Path, most: int = SMALL_FILE, errors: str = "strict") -> str:
    """Return the text of a file read with `read_regular`, with its line breaks unchanged.

    Raises:
        OSError: as `read_regular`.
        UnicodeDecodeError: the file is not UTF-8.
    """
    return read_regular(path, most).decode("utf-8", errors)


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
    """Return the name of a folder while it is being written."""
    return out.with_name(f".{out.name}.partial")


@contextmanager
def atomic_folder(out: Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of `out` to write into, and rename it to `out` at the end.

    An exception inside removes the written files. After a kill the remains have another name
    (`.NAME.partial`), and the next attempt removes them. An existing `out` is refused, or, with
    `replace`, kept until the new folder is complete and then removed.
    """
    if not replace:
        refuse_used_folder(out)
    partial = partial_of(out)
    remove_tree(partial)
    make_folder(partial.parent)
    partial.mkdir(FOLDER_MODE)  # fails if somebody created the path meanwhile
    made = partial.lstat()
    try:
        yield partial
        settle(partial, made)
        if replace:
            _set_aside(out)
        else:
            refuse_used_folder(out)
        os.rename(partial, out)
        sync(out.parent)
        remove_tree(_removed(out))
    except BaseException:
        remove_tree(partial)
        raise


def settle(folder: Path, made: os.stat_result) -> None:
    """Set the mode of everything written into a folder, and sync it to disk.

    Args:
        made: the folder's stat result when it was made; its mode shows the umask.

    Raises:
        CheckpointError: the folder was replaced, or contains a link.
    """
    mode = stat.S_IMODE(made.st_mode)
    for path in [*sorted(folder.rglob("*"), reverse=True), folder]:
        found = path.lstat()
        other = path == folder and not os.path.samestat(found, made)
        if other or not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
            raise CheckpointError(
                f"{path} was replaced while {folder} was written. Somebody else may rename files "
                f"in {folder.parent}: choose a folder of your own."
            )
        group = found.st_mode & stat.S_ISGID
        path.chmod(mode | group if stat.S_ISDIR(found.st_mode) else mode & FILE_MODE)
        sync(path)


def remove_tree(path: Path) -> None:
    """Remove the tree at a path as far as possible; remove a link itself and not its target."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with suppress(OSError):
        path.unlink()


def remove_folder(folder: Path) -> None:
    """Remove a folder atomically, if it exists: it is renamed first, then emptied.

    After a kill in between, the remains have another name (`.NAME.removed`).
    """
    _set_aside(folder)
    remove_tree(_removed(folder))


def _removed(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.removed")


def _set_aside(folder: Path) -> None:
    remove_tree(_removed(folder))
    if os.path.lexists(folder):
        os.rename(folder, _removed(folder))
        sync(folder.parent)


def sync(path: Path) -> None:
    """Sync a file's bytes or a folder's entries to disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
