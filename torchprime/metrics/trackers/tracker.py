"""The protocol of trackers, and the values that they get.

A tracker is a library that shows runs: TensorBoard, Weights & Biases, MLflow, Trackio. Each has a
module here that imports its library when it is opened. metrics.jsonl stays the primary record.

The id of a run in a tracker is in `trackers/NAME.json` in the run's folder, so a resumed run
continues the same run there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

from torchprime.files.atomic import write_json
from torchprime.files.json_files import read_json_if_there
from torchprime.files.private_folders import own_folder
from torchprime.metrics.record import Record

FOLDER = "trackers"  # in the run's folder
Outcome = Literal["finished", "failed", "stopped"]
Cell = str | float | bool | None


class Table(NamedTuple):
    """The graded answers of an evaluation, one row per held-out row."""

    columns: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class TrackedRun:
    """The facts about a run that trackers need.

    Attributes:
        folder: the run's own.
        config: as config.yaml has it.
        first_step: the number of updates before this start.
        offline: write to this machine only.
        finish_seconds: the longest wait at the run's end.
    """

    name: str
    folder: Path
    config: Mapping[str, Any]
    project: str = "torchprime"
    first_step: int = 0
    offline: bool = False
    finish_seconds: float = 60.0

    def own_folder(self) -> Path:
        """Return the folder of the trackers' files in the run's folder."""
        return own_folder(self.folder, FOLDER, "output_dir")

    def remembered(self, tracker: str) -> dict[str, Any]:
        """Return what an earlier start remembered for a tracker; {} if this is the first."""
        return read_json_if_there(self.folder / FOLDER / f"{tracker}.json")

    def remember(self, tracker: str, values: Mapping[str, Any]) -> None:
        """Store the id of the tracker's run for later starts."""
        write_json(self.own_folder() / f"{tracker}.json", values)


class Tracker(Protocol):
    """Protocol of a tracker. One thread calls all methods, so they may be slow; any may raise."""

    name: str

    def open(self) -> str | None:
        """Start or continue the run there; return a line for the user that says where it is."""
        ...

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def table(self, step: int, table: Table) -> None: ...

    def artifact(self, files: Sequence[Path]) -> None:
        """Keep copies of files of the run: its report, its export's certificate."""
        ...

    def close(self, outcome: Outcome) -> None: ...


def library(name: str) -> Any:
    """Import an optional library, by a name of ours; untyped, since few have it installed."""
    return import_module(name)


def scalars(record: Record) -> dict[str, float]:
    """Return a record's numbers by tag: `train/loss`, `eval/loss`, `checkpoint/bytes`."""
    values = record.to_dict()
    for source, loss in (values.pop("source_losses", None) or {}).items():
        values[f"loss/{source}"] = loss
    values |= values.pop("terms", None) or {}
    for grader, score in (values.pop("scores", None) or {}).items():
        values[grader] = score["value"]
    return {
        f"{record.kind}/{name.removeprefix('eval_')}": value
        for name, value in values.items()
        if name != "step" and isinstance(value, int | float)
    }


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a config's values by dotted key."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found
