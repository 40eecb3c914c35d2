"""File names that come from other people's files, checked before they are used here.

A checkpoint's manifest, an index of shards or a tokenizer's settings contain file names. Such a
name has to be one plain name, or several with slashes between them: no part of it may lead out of
the folder, be invisible or change the display of the text around it. Writes under such a name
follow no link.
"""

from __future__ import annotations

from pathlib import Path

from torchprime.errors import CheckpointError
from torchprime.text.visible import clean

MOST_BYTES = 255  # of one name, the limit of file systems
MOST_PARTS = 16
SHOWN = 200


def fault_of(name: object) -> str | None:
    """Return the reason why a text cannot be the name of one file, None if it can."""
    if not isinstance(name, str):
        return f"it is {type(name).__name__}, not text"
    if name in ("", ".", ".."):
        return "it is not a file name"
    if "/" in name or "\\" in name:
        return "it is a path"
    if name != clean(name) or "\n" in name:
        return "it holds control characters or text-direction marks"
    if len(name.encode("utf-8")) > MOST_BYTES:
        return f"it has more than {MOST_BYTES} bytes"
    return None


def checked_name(name: object, where: str) -> str:
    """Return a name after checking that it can be a file's in any folder.

    Args:
        where: the file that the name comes from.

    Raises:
        CheckpointError: it cannot.
    """
    return _checked(name, where, fault_of(name))


def path_fault_of(name: object) -> str | None:
    """Return the reason why a text cannot be a path inside any folder, None if it can."""
    if not isinstance(name, str):
        return fault_of(name)
    parts = name.split("/")
    if len(parts) > MOST_PARTS:
        return f"it has more than {MOST_PARTS} folders"
    if name.startswith("/") or ".." in parts:
        return "it leads out of the folder"
    return next(filter(None, map(fault_of, parts)), None)


def checked_path(name: object, where: str) -> str:
    """Return a checked relative path, with slashes, that stays inside any folder."""
    return _checked(name, where, path_fault_of(name))


def _checked(name: object, where: str, fault: str | None) -> str:
    if fault is None:
        return str(name)
    shown = clean(str(name)).replace("\n", "\\n")
    shown = shown if len(shown) <= SHOWN else f"{shown[:SHOWN]}..."
    raise CheckpointError(
        f"{where} names a file '{shown}', and {fault}; expected a name inside its folder. Nothing "
        "was written. Do not use this folder before you know who wrote that."
    )


def inside(folder: Path, name: object, where: str) -> Path:
    """Return the path of a file to be written into a folder under a foreign name.

    Raises:
        CheckpointError: the name leads out of the folder, or a link is in the path.
    """
    path = folder
    for part in checked_path(name, where).split("/"):
        path = path / part
        if path.is_symlink():
            raise CheckpointError(
                f"{path} is a link, and nothing is written through one. Remove it, or choose "
                "another folder."
            )
    return path
