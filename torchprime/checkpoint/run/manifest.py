"""The manifest of a checkpoint: the facts that a resume needs, and the list of the folder's files.

It is written last, so a folder that has one was written completely; the sizes and hashes in it tell
if the files are still unchanged. It also hashes itself, which detects damage but not forgery: every
field is checked before use, and the files that it names must lie in its folder.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

from torchprime.checkpoint.field_kinds import (
    NUMBER,
    OBJECT,
    SHA256,
    TEXT,
    Table,
    check_fields,
    count,
    list_of,
    or_null,
    texts_to,
)
from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.errors import CheckpointError
from torchprime.files.foreign_names import checked_path
from torchprime.files.hashing import FileFacts

FORMAT_VERSION = 1
MOST_BYTES = 64 << 20
STEP = re.compile(r"step_(\d{8,15})")
# The second form is the name of a checkpoint that a resume from an earlier step put aside.
NAMED_BY_STEP = re.compile(r"(?:set_aside_\d+_)?step_(\d{8,15})")
FIELDS: Table = {
    "backend": TEXT,
    "mesh": texts_to(count(1)),
    "processes": count(1),
    "config": OBJECT,
    "versions": texts_to(TEXT),
    "created": TEXT,
    "model": {"names": count(), "dtype": TEXT, "parameters": count(), "hash": or_null(TEXT)},
    "optimizer": {"name": TEXT, "slots": list_of(TEXT, "a list of names")},
    "scheduler": {
        "name": TEXT,
        "peak": NUMBER,
        "warmup_steps": count(),
        "total_steps": count(),
        "min_lr_ratio": NUMBER,
    },
    "global_step": count(),
    "rng": texts_to(TEXT),
    "data_position": {
        "seed": count(),
        "next_step": count(),
        "global_batch_size": count(1),
        "num_blocks": count(),
    },
    "tokenizer_fingerprint": or_null(TEXT),
    "template_fingerprint": or_null(TEXT),
    "data_manifest": OBJECT,
    "eval_manifest": or_null(OBJECT),
    "best_metric": or_null(OBJECT),
    "hooks": OBJECT,
    "metrics": OBJECT,
    "scores": texts_to(NUMBER),
    "files": OBJECT,
}
BEST: Table = {"scores": texts_to(NUMBER), "step": count()}
FILE: Table = {"bytes": count(), "sha256": SHA256}


class ModelFacts(TypedDict):
    """The weights in a checkpoint. `names` and `parameters` are counts; `hash` is of all names and
    shapes. `base` is the fingerprint of the base's weights, which an adapter or a regularization
    needs on a resume and the checkpoint does not hold; `fisher` is that of the base's Fisher
    information."""

    names: int
    dtype: str
    parameters: int
    hash: str | None
    base: NotRequired[str | None]
    fisher: NotRequired[str | None]


class OptimizerFacts(TypedDict):
    """The optimizer, and the names of its state's `slots`."""

    name: str
    slots: list[str]


class SchedulerFacts(TypedDict):
    """The learning rate's schedule, its lengths in updates.

    `peak` is a learning rate, `min_lr_ratio` a fraction of it. `warmup_ratio` repeats the config's
    value; `warmup_steps` is the result.
    """

    name: str
    peak: float
    warmup_steps: int
    warmup_ratio: float | None
    total_steps: int
    min_lr_ratio: float


class DataPosition(TypedDict):
    """The whole state of a pure order: the next update, counted from 0, and the sizes that define
    the order, in blocks."""

    seed: int
    next_step: int
    global_batch_size: int
    num_blocks: int


class PreparedFacts(TypedDict):
    """The identity of prepared rows: equal fingerprints, equal batches."""

    fingerprint: str | None


class BestCheckpoint(TypedDict):
    """The best checkpoint so far: its updates, and its scores by metric."""

    scores: dict[str, float]
    step: int


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's facts, in JSON types.

    Attributes:
        global_step: updates made; also called `step`.
        backend, mesh, processes: of the run that wrote it; a resume may differ.
        config: as `TrainConfig.to_dict` gives it.
        created: ISO time, for people: nothing is ordered by it.
        rng: states of the random generators in use, in base64.
        tokenizer_fingerprint, template_fingerprint: the latter null without a chat template.
        eval_manifest: null without held-out rows.
        hooks: the states of hooks, by hook; each hook checks its own.
        metrics: the last values, by a label for people.
        scores: measured on held-out rows after exactly this step, by metric.
        files: size and sha256 of every other file of the folder.
    """

    backend: str
    mesh: dict[str, int]
    processes: int
    config: dict[str, Any]
    versions: dict[str, str]
    created: str
    # The eleven fields that a resume needs; model and optimizer describe the tensors in the folder.
    model: ModelFacts
    optimizer: OptimizerFacts
    scheduler: SchedulerFacts
    global_step: int
    rng: dict[str, str]
    data_position: DataPosition
    tokenizer_fingerprint: str | None
    template_fingerprint: str | None
    data_manifest: PreparedFacts
    eval_manifest: PreparedFacts | None
    best_metric: BestCheckpoint | None
    hooks: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, object] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_fields(vars(self), FIELDS)
        if self.best_metric is not None:
            check_fields(self.best_metric, BEST, "best_metric")
        if self.data_position["next_step"] != self.global_step:
            raise ValueError(
                f"data_position.next_step is {self.data_position['next_step']}, global_step "
                f"{self.global_step}; expected the same step in both"
            )

    @property
    def step(self) -> int:
        return self.global_step

    def to_bytes(self) -> bytes:
        """Return the file's content."""
        content = dataclasses.asdict(self)
        envelope = {"format_version": FORMAT_VERSION, "sha256": _own_hash(content), **content}
        return (json.dumps(envelope, indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> Manifest:
        """Parse and check the file's content; `where` names the file in messages.

        Raises:
            CheckpointError: not JSON, changed since it was written, of a newer format, incomplete,
                or with a field that is something else.
        """
        try:
            content = json.loads(data)
            version, claimed = content.pop("format_version"), content.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{where} is not a manifest ({type(error).__name__}: {error}); it was cut short or "
                "overwritten. Resume from another checkpoint."
            ) from error
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{where} has format {version}; this torchprime reads format {FORMAT_VERSION}. "
                "Use the version that wrote it."
            )
        if _own_hash(content) != claimed:
            raise CheckpointError(
                f"{where} has changed since it was written: its sha256 does not match. Resume from "
                "another checkpoint; a manifest must not be edited."
            )
        try:
            manifest = Manifest(**content)
            _check_files(manifest.files, where)
            return manifest
        except (TypeError, ValueError) as error:
            raise CheckpointError(
                f"{where} is not what a run writes: {error}. Resume from another checkpoint."
            ) from error


def read_manifest(storage: Storage, name: str) -> Manifest:
    """Read the manifest of the checkpoint folder `name`.

    Raises:
        CheckpointError: there is none (then there is no checkpoint), it is damaged, or it is of
            another step than the folder's name says.
    """
    where = f"{name}/{MANIFEST}"
    if not storage.exists(where):
        raise CheckpointError(
            f"{storage.describe(name)} holds no {MANIFEST}, so it is not a whole checkpoint."
        )
    told = storage.describe(where)
    manifest = Manifest.from_bytes(storage.read_bytes(where, MOST_BYTES), told)
    named = NAMED_BY_STEP.fullmatch(name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(
            f"{told} is of step {manifest.step}, and its folder is named {name}: it was renamed, "
            "or its files are another checkpoint's. Resume from another checkpoint."
        )
    return manifest


def _check_files(files: Mapping[str, Any], where: str) -> None:
    """Check that there are files, and that their names stay inside the folder."""
    if not files:
        raise ValueError("files: given none, so nothing in the folder could be checked")
    for name, facts in files.items():
        checked_path(name, where)
        check_fields(facts, FILE, f"files[{name!r}]")


def _own_hash(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
