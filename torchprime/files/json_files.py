"""JSON files from other people, read with limits: configs, tokenizer files, shard indexes.

Only a regular file is read: a named pipe would block the run, a device would fill the memory. Size
and nesting are limited. A duplicate key is refused, since parsers disagree on the value that
counts. Every fault is a `CheckpointError` that names the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torchprime.errors import CheckpointError
from torchprime.files import atomic

MEBIBYTE = 1 << 20
SMALL = 16 * MEBIBYTE  # a config; those of real models have kilobytes
LARGE = 512 * MEBIBYTE  # a tokenizer.json or an index; the largest real ones have some 40 MB
DEEPEST = 64  # nested objects and lists


def read_json(path: Path, *, most: int = SMALL) -> dict[str, Any]:
    """Return the JSON object in a file.

    Args:
        most: the largest size in bytes.

    Raises:
        CheckpointError: no such file, not a regular one, too large or too deeply nested, not JSON,
            not an object, or a key twice in one object.
    """
    return parse_json(read_regular(path, most=most), path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """Parse the JSON object in a file's bytes, with the checks of `read_json`."""
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique)
        _check(content)
    except RecursionError:
        raise CheckpointError(f"{path} cannot be read as JSON: {_too_deep()}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a JSON object.")
    return content


def read_json_if_there(path: Path, *, most: int = SMALL) -> dict[str, Any]:
    """Return the JSON object in a file, `{}` if there is no such file.

    Raises:
        CheckpointError: as `read_json`.
    """
    return read_json(path, most=most) if os.path.lexists(path) else {}


def read_regular(path: Path, *, most: int) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        CheckpointError: no such file, not a regular one, or it has more than `most` bytes.
    """
    try:
        return atomic.read_regular(path, most)
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read: {error.strerror or error}. Put the file itself there, or "
            "fetch it again."
        ) from error


def token_ids(content: Mapping[str, Any], key: str, where: str) -> list[int]:
    """Return the token ids under a key, whose value is one id, several or null.

    Args:
        where: the file's name, for messages.

    Raises:
        CheckpointError: the value is something else.
    """
    value = content.get(key)
    values: Sequence[Any] = [] if value is None else value if isinstance(value, list) else [value]
    if all(isinstance(each, int) and not isinstance(each, bool) and each >= 0 for each in values):
        return list(values)
    raise CheckpointError(
        f"{where}: {key} is {value!r:.100}, expected a token's id, a list of ids, or null."
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in content if names.count(key) > 1)
        raise ValueError(f"the key {twice!r:.100} is written twice in one object; remove one")
    return content


def _check(content: Any) -> None:
    """Check all values without recursion: later readers have less stack left."""
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        level = [inner for value in level for inner in _inside(value)]
        if not level:
            return
    raise ValueError(_too_deep())


def _too_deep() -> str:
    return f"objects and lists are nested more than {DEEPEST} deep"


def _inside(value: Any) -> Iterator[Any]:
    """Return the objects and lists in a value, after checking that its texts are Unicode."""
    inner = [*value, *value.values()] if isinstance(value, dict) else value
    for each in inner if isinstance(inner, list) else ():
        if isinstance(each, dict | list):
            yield each
        elif isinstance(each, str) and not each.isascii():
            each.encode()  # JSON allows "\ud800" alone, but it can't be encoded: a ValueError
