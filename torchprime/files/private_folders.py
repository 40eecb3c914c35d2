"""Checks that no other user can exchange the files in a folder.

A run's folder, prepared data and compiled programs are read back and trusted. A user who may rename
files in such a folder may also put links under the names that are written next. So such a folder
has to belong to the user of this process, or to root, and nobody else may rename in it:

    0755 ana           accepted      0775 ana, group ana (her own)      accepted
    1777 root          accepted: each may remove only their own files (sticky)
    0755 ben           refused       0775 ana, group team / 0777        refused, with the chmod

A mount may show other user ids than this process has (NFS, virtual machines, containers), or modes
without effect (CIFS, exFAT). The owner and mode of a new file there decide, so one is made as a
test before a folder is refused.
"""

from __future__ import annotations

import grp
import os
import pwd
import shlex
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from torchprime.errors import RuntimeSetupError
from torchprime.files.atomic import make_folder
from torchprime.files.foreign_names import inside

ROOT = 0
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def require_private(folder: Path, key: str) -> None:
    """Refuse an existing folder in which other users could exchange files.

    Args:
        key: the config key, or the command's argument, that names the folder.

    Raises:
        RuntimeSetupError: the folder is not private; the message has the command that fixes it.
    """
    if (fault := fault_of(folder)) is not None:
        raise RuntimeSetupError(f"{key}: {fault}")


def fault_of(folder: Path) -> str | None:
    """Return a folder's fault and its fix; None if it is private or does not exist."""
    for link, owner in _foreign_links(folder):
        return (
            f"{link} is a link that belongs to {_user(owner)}, who can redirect it at any "
            "moment. Give the path of the folder itself."
        )
    try:
        found = os.stat(folder)
    except FileNotFoundError:
        return _dangling(folder)
    except OSError as error:
        return f"{folder} cannot be inspected ({error.strerror}). Give another folder."
    if not stat.S_ISDIR(found.st_mode):
        return None  # the code that makes folders reports it
    return _fault_of_owner(folder, found) or _fault_of_mode(folder, found)


def own_folder(folder: Path, name: str, key: str) -> Path:
    """Return a folder inside a private one; it is made if it does not exist.

    Raises:
        RuntimeSetupError: the folder is not private, or cannot be made.
        CheckpointError: the folder is a link.
    """
    path = inside(folder, name, str(folder))
    try:
        make_folder(path)
    except OSError as error:
        raise RuntimeSetupError(
            f"{key}: {path} cannot be made ({error.strerror}). Make room, give this user the right "
            "to write there, or remove what lies in its place."
        ) from error
    require_private(path, key)
    return path


def _fault_of_owner(folder: Path, found: os.stat_result) -> str | None:
    if found.st_uid in (ROOT, os.geteuid()):
        return None
    mine, _ = _tried(folder)
    if mine == found.st_uid:
        return None
    who = _user(found.st_uid)
    return (
        f"{folder} belongs to {who}, and this process runs as {_user(os.geteuid())}: files "
        "in it could be replaced while they are used. Give another folder (a new one inside it is "
        f"fine), run as {who} (in a container: --user {found.st_uid}:{found.st_gid}), or take it "
        f"over: chown -R {os.geteuid()} {shlex.quote(str(folder))}"
    )


def _fault_of_mode(folder: Path, found: os.stat_result) -> str | None:
    written = found.st_mode & OTHERS_WRITE
    if not written or found.st_mode & stat.S_ISVTX or _is_own_group(folder, found):
        return None
    _, meaningless = _tried(folder)
    if meaningless:
        return None
    who = "every user" if written & stat.S_IWOTH else f"the group {_group(found.st_gid)}"
    right = "go-w" if written & stat.S_IWOTH else "g-w"
    quoted = shlex.quote(str(folder))
    return (
        f"{folder} can be written by {who} (mode {stat.S_IMODE(found.st_mode):04o}): files "
        f"in it could be replaced while they are used. Remove that right: chmod {right} {quoted}; "
        f"or let users remove only their own files: chmod +t {quoted}; or give a new folder inside "
        "it"
    )


def _is_own_group(folder: Path, found: os.stat_result) -> bool:
    """Return True for a group that is named like its only member, a user's own group."""
    if found.st_mode & stat.S_IWOTH or _has_access_list(folder):
        return False
    try:
        user, group = pwd.getpwuid(os.geteuid()), grp.getgrgid(found.st_gid)
    except KeyError:
        return False
    alone = set(group.gr_mem) <= {user.pw_name}
    return group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and alone


def _has_access_list(folder: Path) -> bool:
    """Return True if the mode's group bits are the mask of an access control list."""
    with suppress(OSError, AttributeError):  # AttributeError: not Linux
        return "system.posix_acl_access" in os.listxattr(folder)
    return False


def _tried(folder: Path) -> tuple[int | None, bool]:
    """Return the owner of a test folder made in this one, and True if its mode has no effect."""
    try:
        with tempfile.TemporaryDirectory(prefix=".torchprime-", dir=folder) as made:
            found = os.stat(made)
    except OSError:
        return None, False
    return found.st_uid, bool(found.st_mode & OTHERS_WRITE)


def _foreign_links(folder: Path) -> Iterator[tuple[Path, int]]:
    """Return links in the path that neither this user, root nor the owner of their folder made."""
    path = folder.absolute()
    for place in [*reversed(path.parents), path]:
        with suppress(OSError):
            found = os.lstat(place)
            trusted = (ROOT, os.geteuid(), os.stat(place.parent).st_uid)
            if stat.S_ISLNK(found.st_mode) and found.st_uid not in trusted:
                yield place, found.st_uid


def _dangling(folder: Path) -> str | None:
    if not folder.is_symlink():
        return None
    return f"{folder} is a link to {os.readlink(folder)}, which is not there. Remove the link."


def _user(number: int) -> str:
    with suppress(KeyError):
        return f"user {pwd.getpwuid(number).pw_name}"
    return f"user {number}"


def _group(number: int) -> str:
    with suppress(KeyError):
        return grp.getgrgid(number).gr_name
    return str(number)
