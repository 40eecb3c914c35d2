"""Splits from file names: the Hugging Face Hub's convention, for files anywhere.

      data/NAME-00000-of-00003.parquet        the split NAME, whatever it is
    train/rows.jsonl, my-train.v2/a/b.csv   a folder's name has a keyword of a split
    train.jsonl, rows_dev-1.jsonl           a file's name has one

A keyword is a whole name, or stands between separators: `-`, `.`, `_`, a space, a digit. The first
of the three patterns that fits any file applies to all files, as on the hub. The hub leaves out a
file that the pattern does not fit; here that is an error, and so is a file with two splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, TypeVar

from torchprime.config.sections.dataset import DatasetConfig
from torchprime.errors import DataError

KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"data/(\w+(?:\.\w+)*)-\d{5}-of-\d{5}[^/]*\.[^/]*")
_SEPARATOR = "[-._ 0-9]"
_MOST_NAMES = 5  # in a message

File = TypeVar("File")


@dataclass(frozen=True)
class SplitKey:
    """The requested split, and the config key that requests it.

    Attributes:
        name: None if the key is not set.
        unset: the key's default value, which requests no particular split, for messages.
        is_used: the file names have already selected the split.
    """

    name: str | None = DatasetConfig.split
    key: str = "dataset.split"
    unset: str = DatasetConfig.split
    is_used: bool = False

    @property
    def asks(self) -> bool:
        """Return False for the default, with which files without splits are read too."""
        return self.name not in (None, DatasetConfig.split) and not self.is_used


DEFAULT_SPLIT = SplitKey()


def splits_of(names: Sequence[str]) -> list[set[str]]:
    """Return the splits of each file, by its name below the folder; sets may be empty."""
    for way in (_by_shard, _by_folder, _by_file):
        found = [way(name) for name in names]
        if any(found):
            return found
    return [set() for _ in names]


def _by_shard(name: str) -> set[str]:
    found = _SHARD.fullmatch(name)
    return {found[1]} if found else set()


def _by_folder(name: str) -> set[str]:
    return {split for part in PurePosixPath(name).parts[:-1] for split in _keywords_in(part, "?")}


def _by_file(name: str) -> set[str]:
    return _keywords_in(PurePosixPath(name).name, "")  # an extension follows


def _keywords_in(text: str, may_end: str) -> set[str]:
    """Return the splits with a keyword in the text; with `may_end` "?" no separator need follow."""
    around = rf"(?:.*{_SEPARATOR})?(?:%s)(?:{_SEPARATOR}.*){may_end}"
    return {
        split for split, words in KEYWORDS.items() if re.fullmatch(around % "|".join(words), text)
    }


def splits_of_file(path: str) -> set[str]:
    """Return the splits in a file's own name, or in a folder's name that is only a keyword."""
    folder = PurePosixPath(path).parent.name
    here = {split for split, words in KEYWORDS.items() if folder in words}
    return here | _by_file(path) | _by_shard("/".join(path.split("/")[-2:]))


def choose_split(
    files: Sequence[tuple[File, set[str]]], wanted: SplitKey, given: str, may_be_only: bool
) -> list[File]:
    """Return the files of the requested split; all files if none has a split.

    Args:
        files: each with the splits that its name gives.
        given: the path's key and value, for messages.
        may_be_only: use the only split if none is requested.

    Raises:
        DataError: files with and without a split, a file of two splits, a split that no file has,
            or several and none asked for.
    """
    found = {split: None for _, splits in files for split in sorted(splits)}
    if not found:
        return [file for file, _ in files]
    names = ", ".join(found)
    fix = "Rename or move them, or give a glob that matches only the files you mean"
    without = [file for file, splits in files if not splits]
    if without:
        raise DataError(
            f"{given}: beside files named for the splits {names} there are files without the name "
            f"of a split: {_some(without)}. {fix}"
        )
    if wanted.name is None and not (may_be_only and len(found) == 1):
        raise DataError(
            f"{given} has files of the splits {names}, and {wanted.key} is not set. Set "
            f"{wanted.key} to one of them"
        )
    chosen = names if wanted.name is None else same_split(wanted.name, list(found))
    if chosen is None:
        raise DataError(
            f"{wanted.key}={wanted.name} selects no file of {given}: the splits there are {names}. "
            f"Set {wanted.key} to one of them"
        )
    mine = [(file, splits) for file, splits in files if chosen in splits]
    twice = [file for file, splits in mine if len(splits) > 1]
    if twice:
        raise DataError(
            f"{given}: the names of some files say {chosen} and another split, too: "
            f"{_some(twice)}. {fix}"
        )
    return [file for file, _ in mine]


def same_split(name: str | None, found: Sequence[str]) -> str | None:
    """Return the split in `found` that is `name`, or that another keyword of it names."""
    if name is None or name in found:
        return name
    words = next((words for words in KEYWORDS.values() if name in words), ())
    meant = [split for split in found if split in words]
    return meant[0] if len(meant) == 1 else None


def _some(files: Iterable[Any]) -> str:
    names = [file.name for file in files]
    more = f" and {len(names) - _MOST_NAMES:,} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more


def unused_split(wanted: SplitKey, where: str, found: Sequence[str] = ()) -> DataError:
    """Return the error for a requested split where there are no splits."""
    lists = f"has only the list {', '.join(found)}" if found else "has no splits"
    return DataError(
        f"{wanted.key}={wanted.name} is set, but {where} {lists}: no file or folder name and no "
        f"list of a JSON document says {wanted.name}. Set {wanted.key}={wanted.unset}, or give the "
        f"files of that split"
    )
