"""The list of a run's checkpoints: whole ones, damaged ones, and those that retention keeps.

Damage is named, and no checkpoint is removed that something still needs.
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from read_only import make_read_only

from torchprime.checkpoint.run.catalog import BEST, LATEST, Catalog
from torchprime.checkpoint.run.local_storage import LocalStorage
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.errors import CheckpointError


def fill(
    storage: Storage, helper: SimpleNamespace, steps: dict[int, float | None], **changes: Any
) -> Catalog:
    """Checkpoints at these steps with these scores, written in this order."""
    catalog = Catalog(storage)
    for step, score in steps.items():
        scores = {} if score is None else {"eval_loss": score}
        name = catalog.name_of(step)
        tensors = {"model.a": torch.full((50, 50), float(step)), "model.b": torch.ones(3)}
        helper.write(storage, name, tensors, global_step=step, scores=scores, **changes)
    return catalog


def test_steps_are_ordered_by_name_not_by_time(
    storage: Storage, run_checkpoint: SimpleNamespace
) -> None:
    """The clock goes backwards between them, in the manifests and on the disk."""
    catalog = Catalog(storage)
    assert catalog.steps() == [] and catalog.newest_whole(print) is None
    fill(storage, run_checkpoint, {200: None}, created="2030-01-01T00:00:00+00:00")
    fill(storage, run_checkpoint, {100_000_000: None}, created="1999-01-01T00:00:00+00:00")
    fill(storage, run_checkpoint, {90: None}, created="2031-01-01T00:00:00+00:00")
    if isinstance(storage, LocalStorage):
        os.utime(storage.root / "step_100000000", (0, 0))
    assert catalog.steps() == [90, 200, 100_000_000]
    assert catalog.newest_whole(print) == "step_100000000"


def damage_truncated(folder: Path) -> None:
    os.truncate(folder / "__0_0.distcp", 5000)


def damage_flipped(folder: Path) -> None:
    """One bit, in the middle of the numbers."""
    data = bytearray((folder / "__0_0.distcp").read_bytes())
    data[5000] ^= 1
    (folder / "__0_0.distcp").write_bytes(data)


def damage_missing(folder: Path) -> None:
    (folder / "__0_0.distcp").unlink()


def damage_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:-1] + b"x")


def damage_no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def damage_manifest_cut(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 200)


def damage_manifest_changed(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"global_step": 3', '"global_step": 4'))


DAMAGES = [
    (damage_truncated, "__0_0.distcp is damaged: it has 5,000 bytes, not"),
    (damage_flipped, "__0_0.distcp is damaged: its sha256"),
    (damage_missing, "__0_0.distcp is missing"),
    (damage_metadata, ".metadata is damaged: its sha256"),
    (damage_no_manifest, "step_00000003 holds no manifest.json"),
    (damage_manifest_cut, "manifest.json is not a manifest"),
    (damage_manifest_changed, "manifest.json has changed since it was written"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=lambda value: str(value)[:30])
def test_a_damaged_one_is_skipped_with_a_message(
    tmp_path: Path, run_checkpoint: SimpleNamespace, damage: Any, message: str
) -> None:
    catalog = fill(open_storage(tmp_path), run_checkpoint, {1: None, 2: None, 3: None})
    said: list[str] = []
    assert catalog.newest_whole(said.append) == "step_00000003" and not said
    damage(tmp_path / "step_00000003")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    assert catalog.newest_whole(said.append) == "step_00000002"
    assert len(said) == 1 and message in said[0] and "step_00000003" in said[0]
    assert sorted(path.name for path in tmp_path.rglob("*")) == before, "looking removes nothing"
    with pytest.raises(CheckpointError, match="step_00000003"):
        catalog.check("step_00000003")


def test_sizes_alone_do_not_see_a_flipped_bit(
    tmp_path: Path, run_checkpoint: SimpleNamespace
) -> None:
    catalog = fill(open_storage(tmp_path), run_checkpoint, {3: None})
    damage_flipped(tmp_path / "step_00000003")
    catalog.check("step_00000003", deep=False)
    damage_truncated(tmp_path / "step_00000003")
    with pytest.raises(CheckpointError, match="5,000 bytes"):
        catalog.check("step_00000003", deep=False)


def test_damage_in_a_store_is_found(run_checkpoint: SimpleNamespace, storage: Storage) -> None:
    catalog = fill(storage, run_checkpoint, {1: None, 2: None})
    path = "step_00000002/__0_0.distcp"
    data = bytearray(storage.read_bytes(path))
    data[5000] ^= 1
    storage.write_bytes(path, bytes(data))
    said: list[str] = []
    assert catalog.newest_whole(said.append) == "step_00000001"
    assert path in said[0]


def test_pointers(storage: Storage, run_checkpoint: SimpleNamespace) -> None:
    catalog = fill(storage, run_checkpoint, {1: None})
    assert catalog.pointed(LATEST) is None
    catalog.point(LATEST, "step_00000001")
    catalog.point(LATEST, "step_00000002")
    assert catalog.pointed(LATEST) == "step_00000002" and catalog.pointed(BEST) is None
    assert catalog.steps() == [1]


SCORES = {10: 3.0, 20: 1.0, 30: 2.0, 40: float("nan"), 50: None, 60: 5.0, 70: 4.0}


@pytest.mark.parametrize(
    ("keep_last", "keep_best", "keep_every", "left"),
    [
        (None, 0, None, [10, 20, 30, 40, 50, 60, 70]),
        (1, 0, None, [70]),
        (2, 1, None, [20, 60, 70]),
        (1, 3, None, [10, 20, 30, 70]),
        (1, 0, 20, [20, 40, 60, 70]),
        (9, 0, None, [10, 20, 30, 40, 50, 60, 70]),
    ],
)
def test_what_is_kept(
    storage: Storage,
    run_checkpoint: SimpleNamespace,
    keep_last: int | None,
    keep_best: int,
    keep_every: int | None,
    left: list[int],
) -> None:
    catalog = fill(storage, run_checkpoint, SCORES)
    removed = catalog.retain(keep_last, keep_best, keep_every)
    assert catalog.steps() == left
    assert removed == [catalog.name_of(step) for step in SCORES if step not in left]
    assert storage.names() == [catalog.name_of(step) for step in left]
    for step in left:
        catalog.check(catalog.name_of(step))


def test_what_is_pointed_to_stays(storage: Storage, run_checkpoint: SimpleNamespace) -> None:
    catalog = fill(storage, run_checkpoint, {10: 9.0, 20: 8.0, 30: 7.0})
    catalog.point(LATEST, "step_00000010")
    catalog.point(BEST, "step_00000020")
    assert catalog.retain(1, 0, None) == []
    catalog.point(LATEST, "step_00000030")
    assert catalog.retain(1, 0, None) == ["step_00000010"]


def test_a_damaged_manifest_does_not_stop_retention(
    tmp_path: Path, run_checkpoint: SimpleNamespace
) -> None:
    catalog = fill(open_storage(tmp_path), run_checkpoint, {1: 1.0, 2: 2.0, 3: 3.0})
    damage_manifest_cut(tmp_path / "step_00000001")
    assert catalog.retain(1, 1, None) == ["step_00000001"]
    assert catalog.steps() == [2, 3]


def test_leftovers_are_removed_and_nothing_else(
    storage: Storage, run_checkpoint: SimpleNamespace
) -> None:
    catalog = fill(storage, run_checkpoint, {1: None, 2: None})
    storage.write_bytes("latest", b"step_00000002\n")
    for name in ("theirs", ".theirs.partial"):
        with storage.create(name) as writer:
            writer.write_bytes(MANIFEST, b"{}")
    if isinstance(storage, LocalStorage):
        (storage.root / "step_00000002").rename(storage.root / ".step_00000002.removed")
        (storage.root / ".step_00000003.partial").mkdir()
        (storage.root / ".step_00000003.partial" / "a").write_bytes(b"a")
    else:  # no other names there: the manifest was not written, or removed already
        storage._fs.rm(storage._at(f"step_00000002/{MANIFEST}"))  # type: ignore[attr-defined]
        storage.write_bytes("theirs/more", b"no manifest of theirs")
    catalog.clean()
    assert storage.names() == [".theirs.partial", "latest", "step_00000001", "theirs"]
    catalog.check("step_00000001")


def test_what_lies_behind_a_resume_is_set_aside(
    storage: Storage, run_checkpoint: SimpleNamespace
) -> None:
    catalog = fill(storage, run_checkpoint, {1: 1.0, 2: 2.0, 3: 3.0})
    catalog.point(LATEST, "step_00000003")
    catalog.point(BEST, "step_00000001")
    said: list[str] = []
    catalog.set_aside_after(2, said.append)
    assert catalog.steps() == [1, 2]
    assert catalog.pointed(LATEST) == "step_00000002" and catalog.pointed(BEST) == "step_00000001"
    assert len(said) == 1 and "set_aside_1_step_00000003" in said[0]
    catalog.check("set_aside_1_step_00000003")
    fill(storage, run_checkpoint, {3: None})
    catalog.set_aside_after(2, said.append)
    catalog.check("set_aside_2_step_00000003")
    catalog.clean()
    assert storage.names() == [
        "best",
        "latest",
        "set_aside_1_step_00000003",
        "set_aside_2_step_00000003",
        "step_00000001",
        "step_00000002",
    ]


@pytest.mark.parametrize(
    ("scores", "best"), [({1: 3.0, 2: 2.0, 3: 2.5, 4: 1.0}, 2), ({2: None, 3: None, 4: 1.0}, None)]
)
def test_the_best_of_what_is_left_takes_the_place_of_one_set_aside(
    storage: Storage, run_checkpoint: SimpleNamespace, scores: dict, best: int | None
) -> None:
    """There is no best checkpoint if none has a rank."""
    catalog = fill(storage, run_checkpoint, scores)
    catalog.point(BEST, "step_00000004")
    catalog.set_aside_after(3, lambda line: None)
    assert catalog.pointed(BEST) == (None if best is None else catalog.name_of(best))
    assert catalog.pointed(LATEST) is None


def test_a_full_disk_loses_nothing(small_disk: Path, run_checkpoint: SimpleNamespace) -> None:
    storage = open_storage(small_disk / "checkpoints")
    catalog = fill(storage, run_checkpoint, {1: None})
    large = {"model.a": torch.zeros(2_000_000)}
    with pytest.raises(
        CheckpointError, match=r"step_00000002/__0_0.distcp failed: no space \(.* left"
    ):
        run_checkpoint.write(storage, "step_00000002", large)
    assert storage.names() == ["step_00000001"], "what was half written takes no space"
    assert catalog.newest_whole(print) == "step_00000001"
    fill(storage, run_checkpoint, {3: None})
    assert catalog.steps() == [1, 3]


def test_a_read_only_disk_is_named(small_disk: Path, run_checkpoint: SimpleNamespace) -> None:
    storage = open_storage(small_disk / "checkpoints")
    catalog = fill(storage, run_checkpoint, {1: None, 2: None})
    make_read_only(small_disk)
    with pytest.raises(CheckpointError, match="Writing .*step_00000003 failed.*right to write"):
        fill(storage, run_checkpoint, {3: None})
    with pytest.raises(CheckpointError, match="Writing .*latest failed.*right to write"):
        catalog.point(LATEST, "step_00000002")
    with pytest.raises(CheckpointError, match="Removing .*step_00000001 failed.*right to write"):
        catalog.retain(1, 0, None)
    assert catalog.newest_whole(print) == "step_00000002"
