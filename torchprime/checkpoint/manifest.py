"""The manifest of a checkpoint: what a resume needs to know, and what the folder must hold.

It is written last, so a folder that has one is whole as far as writing goes; the sizes and hashes
in it say whether it still is. It also hashes itself.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torchprime.checkpoint.storage import MANIFEST, FileFacts, Storage
from torchprime.errors import CheckpointError

FORMAT_VERSION = 1
# What must be in the parts that are mappings.
REQUIRED = {
    "model": ("names", "dtype", "parameters", "hash"),
    "optimizer": ("name", "slots"),
    "scheduler": ("name", "peak", "warmup_steps", "total_steps", "min_lr_ratio"),
    "data_position": ("seed", "next_step", "global_batch_size", "num_blocks"),
    "best_metric": ("scores", "step"),
}


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's facts, as JSON can say them.

    Attributes:
        global_step: updates made; also called `step`.
        backend, mesh, processes: how it ran; a resume may differ.
        config: as `TrainConfig.to_dict` gives it.
        created: ISO time, for people: nothing is ordered by it.
        model: `names` of weights (count), their `dtype`, number of `parameters`, and `hash` of all
            names and shapes.
        optimizer: `name` and its state `slots`.
        scheduler: `name`, `peak`, `warmup_steps`, `total_steps`, `min_lr_ratio`.
        rng: states of the random generators in use, in base64.
        data_position: `seed`, `next_step`, `global_batch_size`, `num_blocks`: the whole state of a
            pure order.
        tokenizer_fingerprint, template_fingerprint: the latter null without a chat template.
        data_manifest, eval_manifest: fingerprints of the prepared data, by source.
        best_metric: `scores` and `step` of the best so far, or null.
        hooks: what hooks remember, by hook.
        metrics: the last values.
        scores: what was measured on held-out rows after this very step, by metric.
        files: size and sha256 of every other file of the folder.
    """

    backend: str
    mesh: dict[str, int]
    processes: int
    config: dict[str, Any]
    versions: dict[str, str]
    created: str
    # The eleven that a resume needs; model and optimizer describe the tensors beside the manifest.
    model: dict[str, Any]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    global_step: int
    rng: dict[str, Any]
    data_position: dict[str, Any]
    tokenizer_fingerprint: str | None
    template_fingerprint: str | None
    data_manifest: dict[str, Any]
    eval_manifest: dict[str, Any] | None
    best_metric: dict[str, Any] | None
    hooks: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, float] = field(default_factory=dict)
    files: dict[str, FileFacts] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, keys in REQUIRED.items():
            part = getattr(self, name)
            missing = [] if part is None else [key for key in keys if key not in part]
            if missing:
                raise ValueError(f"{name} lacks {', '.join(missing)}")

    @property
    def step(self) -> int:
        return self.global_step

    def to_bytes(self) -> bytes:
        """As written to the file."""
        content = dataclasses.asdict(self)
        envelope = {"format_version": FORMAT_VERSION, "sha256": _own_hash(content), **content}
        return (json.dumps(envelope, indent=1, ensure_ascii=False) + "\n").encode()

    @staticmethod
    def from_bytes(data: bytes, where: str) -> Manifest:
        """Parse and check; `where` names the file in messages.

        Raises:
            CheckpointError: not JSON, changed since it was written, of a newer format, or
                incomplete.
        """
        try:
            content = json.loads(data)
            version, claimed = content.pop("format_version"), content.pop("sha256")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
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
                f"{where} has changed since it was written: its sha256 does not fit. Resume from "
                "another checkpoint; a manifest is not for editing."
            )
        try:
            return Manifest(**content)
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"{where} is incomplete: {error}.") from error


def read_manifest(storage: Storage, name: str) -> Manifest:
    """The manifest of the checkpoint folder `name`.

    Raises:
        CheckpointError: there is none (then there is no checkpoint), or it is damaged.
    """
    where = f"{name}/{MANIFEST}"
    if not storage.exists(where):
        raise CheckpointError(
            f"{storage.describe(name)} holds no {MANIFEST}, so it is not a whole checkpoint."
        )
    return Manifest.from_bytes(storage.read_bytes(where), storage.describe(where))


def _own_hash(content: Mapping[str, Any]) -> str:
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
