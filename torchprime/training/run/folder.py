"""A run's folder: created once, never shared with another run, readable without torchprime."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

import torchprime
from torchprime.checkpoint.run.lock import run_lock
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.files.atomic import (
    make_folder,
    read_plain,
    read_regular_text,
    write_json,
    write_text,
)
from torchprime.files.json_files import parse_json
from torchprime.files.private_folders import require_private
from torchprime.installed import installed_versions
from torchprime.metrics.goodput import TIMES

CONFIG, FACTS = "config.yaml", "run.json"
KEY = "output_dir/run_name"
MOST_BYTES = 16 << 20  # of config.yaml, which has some 10 kB
TO_SEND = "export_to_send"  # an export to a URL, until it is uploaded
# Other names that a run creates in its folder.
OWN_NAMES = (
    CONFIG, FACTS, TO_SEND, "data_report.json", "metrics.jsonl", TIMES, "tensorboard", "trackers",
    "evaluations", "checkpoints", "checkpoint.now", "profile", "report.md", "report.html",
)  # fmt: skip
PACKAGES = (
    "torch", "torch_xla", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "jax",
)  # fmt: skip


class FolderLock:
    """The lock of a run's folder: taken once, released at the end of the `with`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._held = ExitStack()
        self._taken = False

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *error: object) -> None:
        self._held.close()

    def take(self) -> None:
        """Keep other processes out of the folder.

        Raises:
            RuntimeSetupError: another process has the lock, or the folder can't be written.
        """
        if not self._taken:
            self._held.enter_context(run_lock(self.folder))
            self._taken = True

    def take_if_there(self) -> None:
        """Take the lock if the folder exists: a run that is resumed must not change meanwhile."""
        if self.folder.is_dir():
            self.take()


def folder_of(config: TrainConfig) -> Path:
    """Return the folder of the config's run."""
    return Path(config.output_dir) / (config.run_name or config.task.name)


def check(folder: Path) -> None:
    """Refuse a folder that holds another run or could not be created; create nothing.

    Hidden files do not count: a lock, and files that a kill left before they had their names.

    Raises:
        RuntimeSetupError: naming the folder and the obstacle, or who else may change it.
    """
    require_private(folder, KEY)
    if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
        raise RuntimeSetupError(
            f"{KEY}: {folder} already holds another run. Give this one its own name "
            "(run_name=NAME) or another output_dir, or remove that folder. (Only a run that writes "
            "checkpoints, checkpoint.every_steps=N, can resume from its last one.)"
        )
    place = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    if not place.is_dir():
        raise RuntimeSetupError(_cannot(folder, f"{place} is a file"))
    if not os.access(place, os.W_OK):
        raise RuntimeSetupError(_cannot(folder, f"{place} can't be written"))


def claim(folder: Path) -> None:
    """Run `check`, and create the folder with its parents."""
    check(folder)
    try:
        make_folder(folder)
    except OSError as error:
        raise RuntimeSetupError(_cannot(folder, str(error.strerror))) from error
    require_private(folder, KEY)


def check_export_folder(folder: Path, out: Path) -> None:
    """Refuse an export folder that the run itself writes into.

    Raises:
        ConfigError: it is the run's folder, holds it, or is one of the names a run makes in it.
    """
    run, export = folder.absolute().resolve(), out.absolute().resolve()
    inside = export.relative_to(run).parts if run in export.parents else None
    if export == run or export in run.parents or (inside and inside[0] in OWN_NAMES):
        raise ConfigError(
            f"task.export_checkpoint_path: the export would go to {out}, where this run, {folder}, "
            "writes other files, and an export is never mixed with any. Write export, for example."
        )


def _cannot(folder: Path, why: str) -> str:
    return (
        f"output_dir: {folder} cannot be made ({why}). Set output_dir to a folder that can be "
        "written."
    )


def write_config(folder: Path, config: Mapping[str, Any]) -> None:
    """Write config.yaml: every value that the run used, resolved."""
    write_text(folder / CONFIG, _config_text(config))


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of a run's config.yaml.

    Raises:
        RuntimeSetupError: it cannot be read, is a pipe or a device, is too large, or holds no
            mapping.
    """
    path = folder / CONFIG
    try:
        content = yaml.safe_load(read_regular_text(path, MOST_BYTES))
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, not a mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = error.strerror if isinstance(error, OSError) else " ".join(str(error).split())
        raise RuntimeSetupError(
            f"{path} cannot be read: {reason}. Put back what the run wrote there, or give the run "
            "another name (run_name=NAME)."
        ) from error
    return content


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """Return the sha256 of config.yaml, as `sha256sum` gives it."""
    return hashlib.sha256(_config_text(config).encode()).hexdigest()


def _config_text(config: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(config), sort_keys=False)


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Convert an error of the file system into one message; files written before it stay.

    Raises:
        RuntimeSetupError: naming the folder and the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise RuntimeSetupError(
            f"output_dir/run_name: {error.filename or folder} cannot be written "
            f"({error.strerror or error}). Free some space there, or set output_dir to another "
            "disk."
        ) from error


def write_facts(folder: Path, facts: Mapping[str, Any], step: int) -> None:
    """Write run.json: the present run, and in `starts` each start of this run with its step."""
    path = folder / FACTS
    before = parse_json(read_plain(path).encode(), path) if path.is_file() else {}
    starts = before.get("starts", [])
    now = {key: facts[key] for key in ("command", "versions", "backend", "device", "mesh")}
    write_json(path, {**facts, "starts": [*starts, {"step": step, **now}]})


def add_facts(folder: Path, facts: Mapping[str, Any]) -> None:
    """Add facts to run.json, in place of those with the same names."""
    path = folder / FACTS
    write_json(path, {**parse_json(read_plain(path).encode(), path), **facts})


def versions() -> dict[str, str]:
    """Return our version, Python's and those of the libraries that affect a result."""
    found = {"torchprime": torchprime.__version__, "python": platform.python_version()}
    return found | installed_versions(PACKAGES)


def command() -> str:
    """Return the command line, quoted for a shell."""
    script, *arguments = sys.argv
    if Path(script).name == "torchprime":  # the installed command, which needs no interpreter
        return shlex.join(["torchprime", *arguments])
    return shlex.join([Path(sys.executable).name, script, *arguments])
