"""The start of a run: at its first step, or at a checkpoint.

`auto` resumes from the newest whole checkpoint of the run's own folder, if there is one; `never`
starts at the first step; a number is a step of this run; anything else is a checkpoint's folder or
URL, from which a new run starts. A run that was killed before its first checkpoint begins again.
"""

from __future__ import annotations

import base64
import json
import os
import random
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from torch import Tensor

from torchprime.checkpoint.field_kinds import (
    NUMBER,
    OBJECT,
    check_fields,
    count,
    list_of,
    or_null,
    texts_to,
)
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.local_storage import LocalStorage
from torchprime.checkpoint.run.manifest import STEP, Manifest, read_manifest
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.errors import CheckpointError
from torchprime.evaluation.selection import EarlyStopping, Evaluated
from torchprime.files.atomic import read_plain, write_text
from torchprime.files.foreign_names import inside
from torchprime.files.private_folders import require_private
from torchprime.metrics.record import SpikeRecord, StepRecord
from torchprime.metrics.writers import read_metrics
from torchprime.training.backend import Backend, ResumedState, StepNumbers
from torchprime.training.processes import Processes
from torchprime.training.run import folder as run_folder
from torchprime.training.spikes import NAME as SPIKES

METRICS = "metrics.jsonl"
EVALUATION = "evaluation"  # the hook's key in a manifest
KEPT = {"history": list_of(OBJECT, "a list of objects"), "losses": list_of(NUMBER, "numbers")}
EVALUATED = {
    "step": count(),
    "scores": texts_to(NUMBER),
    "train_loss": or_null(NUMBER),
    "graded": texts_to(OBJECT),
}


@dataclass(frozen=True)
class ResumePoint:
    """A whole checkpoint; `own` if it is one of the run's own."""

    reader: CheckpointReader
    where: str
    own: bool

    def state(self) -> ResumedState:
        """Return the input for the backend's state."""
        watched = SPIKES in self.reader.tensor_names()
        spikes = self.reader.get(SPIKES) if watched else None
        return ResumedState(self.reader.get, self.step, spikes)

    def weight(self, name: str) -> Tensor:
        """Return a weight by its Hugging Face name."""
        return self.reader.get(f"model.{name}")

    @property
    def step(self) -> int:
        return self.reader.manifest.step

    def past(self) -> Past:
        """Return the steps before a start from here; the metrics of another run do not count."""
        manifest = self.reader.manifest
        return Past.of(manifest) if self.own else Past(manifest.step)


def checkpoints_place(folder: Path, given: str | None) -> str:
    """Return the place of a run's checkpoints: in its folder, or where the config says, under its
    name."""
    return str(folder / "checkpoints") if given is None else f"{given.rstrip('/')}/{folder.name}"


def agree_on_point(
    processes: Processes, source: str, catalog: Catalog, say: Callable[[str], None]
) -> ResumePoint | None:
    """Run `find_point` on the first process, for all: only it reads every file."""
    if processes.count == 1:
        return find_point(source, catalog, say)

    def found() -> str | None:
        point = find_point(source, catalog, say)
        return point and point.reader.name

    name = processes.first_does(found)
    if name is None:
        return None
    own = source == "auto" or source.isdigit()
    storage = catalog.storage if own else _split(source)[0]
    return ResumePoint(CheckpointReader(storage, name), storage.describe(name), own)


def find_point(source: str, catalog: Catalog, say: Callable[[str], None]) -> ResumePoint | None:
    """Return the checkpoint to start from, checked file by file; None to start at the first step.

    Raises:
        CheckpointError: the named checkpoint is missing or damaged.
    """
    if source == "never":
        return None
    if source == "auto":
        name = catalog.newest_whole(say)
        if name is None and (damaged := catalog.visible()):
            raise CheckpointError(
                f"{catalog.storage.describe()}: none of the {len(damaged)} checkpoints is whole; "
                "each is named above with its damage. Nothing was touched, for some copy or backup "
                "may mend one. To begin again at the first step, give the run another name "
                "(run_name=NAME), or move that folder away."
            )
    elif source.isdigit():
        name = catalog.name_of(int(source))
        if int(source) not in catalog.steps():
            raise CheckpointError(
                f"resume={source}: {catalog.storage.describe('')} has no checkpoint of step "
                f"{source}. It has {', '.join(map(str, catalog.steps())) or 'none'}."
            )
        catalog.check(name, deep=True)
    else:
        return _foreign(source)
    if name is None:
        return None
    return ResumePoint(
        CheckpointReader(catalog.storage, name), catalog.storage.describe(name), own=True
    )


def _foreign(place: str) -> ResumePoint:
    storage, name = _split(place)
    if not storage.exists(f"{name}/{MANIFEST}"):
        raise CheckpointError(
            f"resume={place}: there is no checkpoint with a manifest.json. Give the folder of one, "
            "as <run>/checkpoints/step_00000600, or auto, never or a step of this run."
        )
    Catalog(storage).check(name, deep=True)
    return ResumePoint(CheckpointReader(storage, name), place, own=False)


def _split(place: str) -> tuple[Storage, str]:
    parent, _, name = place.rstrip("/").rpartition("/")
    return open_storage(parent or "."), name


def recorded_date(source: str, catalog: Catalog) -> str | None:
    """Return the date in the chat template of the run to be resumed, if it has one.

    Only the date is read here: the checkpoint is checked later.
    """
    storage, name = catalog.storage, None
    if source == "auto" and (steps := catalog.steps()):
        name = catalog.name_of(steps[-1])
    elif source.isdigit():
        name = catalog.name_of(int(source))
    elif source not in ("auto", "never"):
        storage, name = _split(source)
    try:
        config = {} if name is None else read_manifest(storage, name).config
    except CheckpointError:
        return None
    return config.get("dataset", {}).get("template_date")


def check_writable(storage: Storage) -> None:
    """Check early that checkpoints can be written, by writing a small file and removing it.

    Raises:
        CheckpointError: a place in which this user may not write.
    """
    try:
        storage.probe()
    except CheckpointError as error:
        raise CheckpointError(
            f"checkpoint.folder: {storage.describe()} cannot hold checkpoints ({error}) Give this "
            "user the right to write there, or set checkpoint.folder to another place."
        ) from error


def check_shared(processes: Processes, storage: Storage) -> None:
    """Check early that all processes use the same place for checkpoints; all of them call it.

    Raises:
        CheckpointError: some process does not see what the first one wrote, on every process.
    """
    if processes.count == 1:
        return
    with ExitStack() as held:
        mark = processes.first_does(lambda: held.enter_context(storage.mark()))
        try:
            problem = None if storage.sees(mark) else "it is not there"
        except CheckpointError as error:
            problem = str(error)
        told = processes.gather(problem)
    if blind := [rank for rank, problem in enumerate(told) if problem]:
        raise CheckpointError(
            f"checkpoint.folder: every process must see {storage.describe()}, but of what the "
            f"first one wrote, process {blind[0]} says: {told[blind[0]]} ({len(blind)} of "
            f"{len(told)} processes). Use a file system that all hosts share, or a URL such as "
            "checkpoint.folder=gs://BUCKET/RUNS."
        )


def may_go_on(source: str, folder: Path, catalog: Catalog) -> None:
    """Refuse early, without reading checkpoints, a folder whose run can't be resumed by this one.

    Raises:
        RuntimeSetupError: the folder holds another run, or others could change its files.
        CheckpointError: a link lies in the place of the checkpoints.
    """
    require_private(folder, run_folder.KEY)
    require_private_storage(catalog.storage, folder)
    own = source == "auto" or source.isdigit()
    if not (own and (catalog.steps() or died_early(folder))):
        run_folder.check(folder)


def require_private_storage(storage: Storage, folder: Path) -> None:
    """Refuse a place for checkpoints that others could replace, or that is a link in the run's
    folder."""
    if not isinstance(storage, LocalStorage):
        return
    if storage.root.parent == folder:
        inside(folder, storage.root.name, str(folder))
    require_private(storage.root, "checkpoint.folder")


def died_early(folder: Path) -> bool:
    """Return True if the folder's run was configured to write checkpoints.

    Raises:
        RuntimeSetupError: its config.yaml cannot be read.
    """
    if not os.path.lexists(folder / run_folder.CONFIG):
        return False
    config = run_folder.read_config(folder)
    try:
        wanted = config["checkpoint"]
        asked = wanted["every_steps"] is not None or wanted["every_minutes"] is not None
        return asked or config["export"]["which"] == "best"
    except (KeyError, TypeError):
        return False


# Random state -------------------------------------------------------------------------------------


def rng_states(device: str) -> dict[str, str]:
    """Return the state of every random generator that a run may use, as text."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": json.dumps(random.getstate()),
        "numpy": json.dumps([kind, np.asarray(keys).tolist(), position, has_gauss, gauss]),
        "torch": base64.b64encode(torch.get_rng_state().numpy().tobytes()).decode(),
        "device": device,
    }


def seed_rng(seed: int) -> None:
    """Seed all of them, except the device's, from the run's seed."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def restore_rng(states: Mapping[str, str]) -> None:
    """Restore the states that `rng_states` returned, except the device's.

    Raises:
        CheckpointError: one of them is no state of that generator.
    """
    restore: dict[str, Callable[[str], None]] = {
        "python": _restore_python,
        "numpy": lambda text: np.random.set_state(tuple(json.loads(text))),
        "torch": lambda text: torch.set_rng_state(_tensor_of(text)),
    }
    for name, give_back in restore.items():
        try:
            give_back(states[name])
        except Exception as error:  # the libraries raise nearly any exception
            raise CheckpointError(
                f"the checkpoint's manifest: rng.{name} is no state of that generator "
                f"({type(error).__name__}). Resume from another checkpoint."
            ) from error


def restore_device(backend: Backend, states: Mapping[str, str]) -> None:
    """Restore the state of the device's generator; see `restore_rng`."""
    try:
        backend.set_rng_state(states["device"])
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint's manifest: rng.device is no state of {backend.name}'s generator "
            f"({type(error).__name__}). Resume from another checkpoint."
        ) from error


def _restore_python(text: str) -> None:
    version, numbers, gauss = json.loads(text)
    random.setstate((version, tuple(numbers), gauss))


def _tensor_of(text: str) -> Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


# Records ------------------------------------------------------------------------------------------


def cut_metrics(path: Path, step: int) -> None:
    """Keep the records up to a step; later ones are written again."""
    if not path.is_file():
        return
    lines = read_plain(path).split("\n")[:-1]  # a line torn by a kill is dropped
    records = [json.loads(line) for line in lines]
    logged = [r["step"] for r in records if r["kind"] == StepRecord.kind and r["step"] <= step]
    until = {SpikeRecord.kind: max(logged, default=0)}  # later ones are in the checkpoint
    pairs = zip(lines, records, strict=True)
    kept = [line for line, r in pairs if r["step"] <= until.get(r["kind"], step)]
    write_text(path, "".join(f"{line}\n" for line in kept))


class KeptEvaluations(TypedDict):
    """The evaluation hook's state in a manifest: the fields of each `Evaluated`, and the training
    losses logged since the last of them."""

    history: list[dict[str, object]]
    losses: list[float]


@dataclass(frozen=True)
class Past:
    """The steps before this start, and their metrics; they are in the checkpoint, for all
    processes."""

    step: int = 0  # the number of updates done
    history: tuple[Evaluated, ...] = ()  # one for each evaluated step
    losses: tuple[float, ...] = ()  # of training, logged since the last of them

    @classmethod
    def of(cls, manifest: Manifest) -> Past:
        """Make it from the manifest and the state in it that the evaluation hook saved.

        Raises:
            CheckpointError: the state is malformed.
        """
        kept = manifest.hooks.get(EVALUATION)
        if kept is None:
            return cls(manifest.step)
        try:
            check_fields(kept, KEPT, f"hooks.{EVALUATION}")
            for each in kept["history"]:
                check_fields(each, EVALUATED, f"hooks.{EVALUATION}.history")
            history = tuple(Evaluated(**each) for each in kept["history"])
            return cls(manifest.step, history, tuple(kept["losses"]))
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"the checkpoint's manifest is not what a run writes: {error}. Resume from another "
                "checkpoint."
            ) from error

    def stopped_early(self, stopping: EarlyStopping | None) -> bool:
        """Return True if the last step before this start ended the run early."""
        if stopping is None or not self.history or self.history[-1].step != self.step:
            return False
        return stopping.reason(self.history) is not None

    def to_dict(self) -> dict[str, KeptEvaluations]:
        """Return the hook's state for a manifest, which has the step elsewhere."""
        history = [asdict(each) for each in self.history]
        return {EVALUATION: {"history": history, "losses": list(self.losses)}}


def last_numbers(path: Path, step: int) -> StepNumbers | None:
    """Return the last numbers in a run's records up to this step; only the first process may have
    them."""
    records = read_metrics(path) if path.is_file() else []
    steps = [r for r in records if r["kind"] == StepRecord.kind and r["step"] <= step]
    if not steps:
        return None
    return StepNumbers(steps[-1]["loss"], steps[-1]["grad_norm"], float("nan"), bad_step=0)


def cut_evaluations(folder: Path, step: int) -> None:
    """Remove the samples of later steps, which are generated again, or never."""
    inside(folder.parent, folder.name, str(folder.parent))
    for path in folder.glob("step_*.jsonl") if folder.is_dir() else ():
        named = STEP.fullmatch(path.stem)
        if named and int(named[1]) > step:
            path.unlink()


def set_aside(folder: Path, say: Callable[[str], None]) -> None:
    """Rename the records of a run that starts again."""
    metrics = folder / METRICS
    if not metrics.is_file() or not metrics.stat().st_size:
        return
    number = 1
    while (other := folder / f"metrics.before_{number}.jsonl").exists():
        number += 1
    metrics.rename(other)
    say(f"no checkpoint was written before: beginning again; the records so far are in {other}")
