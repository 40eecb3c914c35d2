"""A run with checkpoints, held-out loss and an export, and whether two of them are the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.data.blocks.batch import Batch
from torchprime.training.hooks.checkpoint import CheckpointHook
from torchprime.training.loop import DataOrder

STEPS, EVERY = 12, 3  # the data has fewer blocks than that: an epoch ends in between
TIMES = ("step_seconds", "supervised_tokens_per_s", "slot_tokens_per_s", "mfu", "seconds",
         "share_of_run", "generate_seconds")  # fmt: skip
# Overrides for one process.
ALONE = ("ici_mesh.fsdp=1", "ici_mesh.tensor=1", "task.gradient_accumulation_steps=2")
REPO = Path(__file__).parents[1]
HOST = ("host_memory_bytes", "device_memory_bytes", "compiles")


def overrides(folder: Path, heldout: Path) -> list[str]:
    return [
        f"output_dir={folder.parent}",
        f"run_name={folder.name}",
        f"task.max_steps={STEPS}",
        f"checkpoint.every_steps={EVERY}",
        "checkpoint.keep_last=null",
        "logging_steps=1",
        "eval=file",
        f"eval.file_dataset_path={heldout}",
        "eval.every_steps=6",
        "task.export_checkpoint_path=export",
    ]


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Without what a machine's mood decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in (*TIMES, *HOST)}
        for line in lines
        if line["kind"] == kind
    ]


def assert_same_run(folder: Path, other: Path) -> None:
    """Every record, every weight of the export, every tensor of the last checkpoint."""
    for kind in ("train", "eval"):
        assert records(folder, kind) == records(other, kind)
    ours, theirs = SafetensorsReader(folder / "export"), SafetensorsReader(other / "export")
    assert ours.names() == theirs.names()
    assert all(torch.equal(ours.get(name), theirs.get(name)) for name in ours.names())
    last = [
        CheckpointReader(open_storage(each / "checkpoints"), Catalog.name_of(STEPS))
        for each in (folder, other)
    ]
    names = sorted(last[0].tensor_names())
    assert names == sorted(last[1].tensor_names()) and len(names) > 40
    assert all(torch.equal(last[0].get(name), last[1].get(name)) for name in names)
    assert last[0].manifest.rng == last[1].manifest.rng


def agree(folder: Path, other: Path) -> None:
    """The same batches, losses to fp32's rounding."""
    for ours, theirs in zip(records(folder), records(other), strict=True):
        assert ours["batch_hash"] == theirs["batch_hash"]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)


def torchrun(processes: int, argv: list[str]) -> tuple[int, str]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launch, f"--nproc_per_node={processes}", "-m", "torchprime.torch_native.train"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run([*command, *argv], env=environment, capture_output=True, text=True)
    return done.returncode, done.stderr


class Killed(Exception):
    """Stands for a kill."""


def kill_after(patch: pytest.MonkeyPatch, step: int) -> None:
    """End the next run behind a step, as a kill would: nothing gets a chance to tidy up."""
    original = CheckpointHook.after_step

    def after_step(self: CheckpointHook, done: int, last: bool) -> None:
        original(self, done, last)
        if done == step:
            patch.setattr(CheckpointHook, "after_step", original)
            raise Killed

    patch.setattr(CheckpointHook, "after_step", after_step)


def poison(patch: pytest.MonkeyPatch, steps: Collection[int]) -> None:
    """Make batches whose targets are one rare token, weighted as the real ones were.

    Args:
        steps: of the batches, from 1.
    """
    clean = DataOrder.batch

    def batch(order: DataOrder, step: int) -> Batch:
        found = clean(order, step)
        if step + 1 not in steps:
            return found
        return replace(found, targets=np.where(found.targets < 0, found.targets, 3).astype("int32"))

    patch.setattr(DataOrder, "batch", batch)
