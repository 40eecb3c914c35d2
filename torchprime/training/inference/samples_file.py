"""The folder of a sampling while it grows, and its resume after a kill.

    sampling.json   the settings, written first: they decide what may be added
    samples.jsonl   the graded answers, row by row, appended in whole chunks
    rows.jsonl      the training rows, written last

A chunk that a kill cut off is removed and sampled again. An answer depends on settings, row and
answer number only, so the file is that of an uninterrupted sampling.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchprime.config.checks import refuse
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.evaluation.behaviour import read_samples
from torchprime.files.atomic import clear_temporary, make_folder, open_plain, sync, write_json
from torchprime.files.json_files import read_json
from torchprime.files.private_folders import require_private
from torchprime.training.inference.kept_rows import Graded

SETTINGS, SAMPLES, ROWS = "sampling.json", "samples.jsonl", "rows.jsonl"
OURS = (SETTINGS, SAMPLES, ROWS)


def require_unfinished(out: Path) -> None:
    """Check before anything is read that sampling may write or go on there.

    Raises:
        ConfigError: a complete sampling, or a folder or file of something else.
    """
    if out.is_symlink() or (out.exists() and not out.is_dir()):
        refuse("--out", str(out), "a folder", "Give another name.")
    if (out / ROWS).exists():
        raise ConfigError(
            f"--out: {out} holds a complete sampling ({ROWS}). Give another folder, or remove "
            f"{out / ROWS} to choose again from its samples."
        )
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(name for name in names - {*OURS} if not name.startswith("."))
    if foreign or (SAMPLES in names and SETTINGS not in names):
        raise ConfigError(
            f"--out: {out} holds {', '.join((foreign or [SAMPLES])[:3])}, which is not of a "
            "sampling. Give a new or empty folder."
        )


class SamplesFile:
    """The samples of one sampling, on the first process.

    Args:
        per_row: answers of each row.
        chunk: rows that are answered and written together.
    """

    def __init__(self, out: Path, per_row: int, chunk: int) -> None:
        self.out, self.path = out, out / SAMPLES
        self.per_row, self.chunk = per_row, chunk

    def open(self, settings: Mapping[str, Any], versions: Mapping[str, object]) -> int:
        """Make the folder, or check that it has the same settings; return the number of rows that
        are done.

        Args:
            settings: all that answers and grades depend on, as JSON types.
            versions: of the software, recorded for people.

        Raises:
            ConfigError: the folder's samples have other settings.
        """
        require_private(self.out, "--out")
        make_folder(self.out)
        require_unfinished(self.out)
        clear_temporary(self.out)
        if not (self.out / SETTINGS).exists():
            write_json(self.out / SETTINGS, {**settings, "versions": dict(versions)})
            return 0
        before = read_json(self.out / SETTINGS)
        now = json.loads(json.dumps(settings))
        for name, value in now.items():
            if name not in before or before[name] != value:
                raise ConfigError(
                    f"--out: {self.out} holds samples of other settings: {name} is "
                    f"{json.dumps(before.get(name))} there and {json.dumps(value)} now. Give "
                    "another folder, or the settings of the first start."
                )
        return self._cut()

    def _cut(self) -> int:
        """Remove what is beyond the last whole chunk; return the number of rows before."""
        if not self.path.exists():
            return 0
        with open(open_plain(self.path, os.O_RDWR), "r+b") as file:
            ends, place = [0], 0
            for line in file:
                place += len(line)
                if line.endswith(b"\n"):
                    ends.append(place)
            rows = (len(ends) - 1) // self.per_row // self.chunk * self.chunk
            file.truncate(ends[rows * self.per_row])
        return rows

    def append(self, lines: Sequence[str]) -> None:
        """Add the lines of one chunk, and sync them to disk."""
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
        try:
            with os.fdopen(open_plain(self.path, flags), "ab") as file:
                file.write("".join(lines).encode())
        except OSError as error:
            raise RuntimeSetupError(
                f"{self.path} cannot be written: {error}. Make room; the same command then goes on "
                "after the last whole chunk."
            ) from error
        sync(self.path)

    def read(self, row_ids: Sequence[str]) -> list[list[Graded]]:
        """Return the answers of each row.

        Raises:
            ConfigError: the file has other rows.
        """
        found = read_samples(self.path)
        rows = [found[at : at + self.per_row] for at in range(0, len(found), self.per_row)]
        ids = [[sample.row_id for sample, _ in graded] for graded in rows]
        if ids != [[row_id] * self.per_row for row_id in row_ids]:
            raise ConfigError(
                f"--out: {self.path} does not hold {self.per_row} answers of each row, in order. "
                "Somebody changed it: give another folder."
            )
        return rows
