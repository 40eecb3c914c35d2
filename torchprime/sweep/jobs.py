"""The runs of a sweep: their names, their commands, and what is kept of each on disk.

    <sweep>/learning_rate=0.001,seed=1/             the run's own folder
    <sweep>/.sweep/learning_rate=0.001,seed=1.json  its job: values, config, how it ended
    <sweep>/.sweep/learning_rate=0.001,seed=1.log   its messages

A run is named by the values that differ in the sweep, so the same command finds its runs again, and
a command with more values adds to them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from torchprime.config.checks import shown
from torchprime.config.load import flat_keys
from torchprime.config.many_runs.jobs import Job, Multirun, beginning, name_override
from torchprime.config.overrides import quoted
from torchprime.config.paths import local_path
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError, DataError
from torchprime.files.atomic import make_folder, open_plain, read_regular_text, write_json

JOBS = ".sweep"  # the folder of the jobs in that of the sweep
MOST_BYTES = 16 << 20  # of a job's file
MOST_CHARACTERS = 120  # of a run's name
UNSAFE = re.compile(r"[^\w.,=+-]+", re.ASCII)
# By prefix: keys that change neither the result of a run nor what it is compared by.
INCIDENTAL = (
    "output_dir", "run_name", "resume", "checkpoint", "metrics", "logging_steps", "compile_cache",
    "profile_", "isolation_probe", "allow_recompile",
)  # fmt: skip


@dataclass(frozen=True)
class SweepJob:
    """A run of a sweep.

    Attributes:
        varied: key and value, as typed, of what differs between the runs.
        argv: its command line, without the program's name.
    """

    name: str
    varied: dict[str, str]
    argv: list[str]
    config: TrainConfig


@dataclass(frozen=True)
class JobFile:
    """The state of a job on disk.

    Attributes:
        config: as TrainConfig.to_dict() gives it.
        code: exit code; None while the run goes on, and if the sweep was killed meanwhile.
        message: why the run failed; "" if it did not.
    """

    name: str
    varied: dict[str, str]
    argv: list[str]
    config: dict[str, Any]
    code: int | None = None
    message: str = ""

    @property
    def finished(self) -> bool:
        """Return True if the run came to its end."""
        return self.code == 0


def sweep_folder(many: Multirun) -> Path:
    """Return the folder of a sweep: hydra.sweep.dir, or in output_dir by run_name, or by the
    config's name and the keys that differ.

    Raises:
        ConfigError: output_dir differs between the runs.
    """
    if "output_dir" in many.varied:
        raise ConfigError(
            "output_dir: given several values, expected one: the runs of a sweep are in one "
            "folder. Give output_dir=FOLDER, or hydra.sweep.dir=FOLDER."
        )
    if many.folder is not None:
        return local_path("hydra.sweep.dir", many.folder)
    config = many.config
    named_after_config = config.run_name == many.command.config_name.replace("/", "_")
    if not many.names_runs and not named_after_config:
        return Path(config.output_dir) / str(config.run_name)
    keys = "_".join(short_names(many.varied).values())
    name = f"{many.command.config_name}_sweep" + (f"_{keys}" if keys else "")
    return Path(config.output_dir) / _safe(name)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the last part of each key, or the whole key where that is not unique."""
    last = {key: key.rpartition(".")[2] for key in keys}
    counts = Counter(last.values())
    return {key: short if counts[short] == 1 else key for key, short in last.items()}


def _safe(text: str) -> str:
    """Return a name of one folder; a long one is cut and ends with a hash."""
    name = UNSAFE.sub("_", text).strip("._") or "run"
    if len(name) <= MOST_CHARACTERS:
        return name
    return f"{name[:MOST_CHARACTERS]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def sweep_job(job: Job, many: Multirun, folder: Path) -> SweepJob:
    """Return the job of a sweep: its command names the sweep's folder and the run."""
    parts = (each.lstrip("+~").partition("=") for each in job.overrides)
    values = {key: value for key, _, value in parts}
    varied = {key: values.get(key, "null") for key in many.varied}
    short = short_names([key for key in varied if key != "run_name"])
    told = ",".join(f"{short[key]}={varied[key]}" for key in short)
    name = str(job.config.run_name) if many.names_runs else _safe(told or many.command.config_name)
    placed = (f"output_dir={quoted(str(folder))}", name_override(name))
    own = [each for each in job.overrides if not each.startswith(("output_dir=", "run_name="))]
    return SweepJob(
        name,
        varied,
        [*beginning(many.command), *own, *placed],
        replace(job.config, output_dir=str(folder), run_name=name),
    )


def job_path(folder: Path, name: str, suffix: str = ".json") -> Path:
    """Return the path of a job's file, or with another suffix of its log."""
    return folder / JOBS / f"{name}{suffix}"


def write_job(folder: Path, job: SweepJob, code: int | None = None, message: str = "") -> None:
    """Write a job's file atomically."""
    path = job_path(folder, job.name)
    make_folder(path.parent)
    content = JobFile(job.name, job.varied, job.argv, job.config.to_dict(), code, message)
    write_json(path, asdict(content))


@contextmanager
def job_lock(folder: Path, name: str) -> Iterator[None]:
    """Wait until no other process makes this run, and keep others out: a sweeper may propose the
    same values twice at once."""
    path = job_path(folder, name, ".lock")
    make_folder(path.parent)
    descriptor = open_plain(path, os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def read_job(folder: Path, name: str) -> JobFile | None:
    """Return a job's file; None if the sweep did not start this run.

    Raises:
        DataError: it is damaged.
    """
    path = job_path(folder, name)
    if not path.is_file():
        return None
    try:
        return JobFile(**json.loads(read_regular_text(path, MOST_BYTES)))
    except (OSError, ValueError, TypeError) as error:
        raise DataError(
            f"{path}: cannot be read ({error}), expected what a sweep wrote. Remove it; its run "
            "is then made again."
        ) from error


def read_jobs(folder: Path) -> list[JobFile]:
    """Return the jobs of a sweep's folder by name; none for another folder."""
    names = sorted(path.stem for path in (folder / JOBS).glob("*.json"))
    return [job for name in names if (job := read_job(folder, name)) is not None]


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the keys in which two configs differ, with both values; without incidental ones."""
    first, second = dict(flat_keys(one)), dict(flat_keys(other))
    return {
        key: (first.get(key), second.get(key))
        for key in {**first, **second}
        if first.get(key) != second.get(key) and not key.startswith(INCIDENTAL)
    }


def refuse_other_run(folder: Path, job: SweepJob) -> None:
    """Refuse to take an earlier run with other values for this one.

    Raises:
        ConfigError: naming the run, the key and both values.
    """
    before = read_job(folder, job.name)
    if before is None or not (folder / job.name).is_dir():
        return
    for key, (old, new) in differing(before.config, job.config.to_dict()).items():
        raise ConfigError(
            f"{key}: given {shown(new)}, but {folder / job.name} was made with {shown(old)}. Give "
            "this sweep a folder of its own: run_name=NAME, or hydra.sweep.dir=FOLDER."
        )
