"""Damage is named by file and tensor, and no checkpoint can make the reader run code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.errors import CheckpointError


@pytest.fixture
def written(tmp_path: Path, run_checkpoint: SimpleNamespace) -> Path:
    """The folder of a small checkpoint; its storage is the parent."""
    tensors = {"model.a": torch.arange(2000.0), "model.b": torch.arange(6.0).reshape(2, 3)}
    run_checkpoint.write(open_storage(tmp_path), "step", tensors)
    return tmp_path / "step"


def opened(folder: Path) -> CheckpointReader:
    return CheckpointReader(open_storage(folder.parent), folder.name)


def test_an_unknown_tensor_is_named(written: Path) -> None:
    with opened(written) as reader, pytest.raises(CheckpointError, match="no tensor model.c"):
        reader.get("model.c")


def test_a_truncated_file_is_named(written: Path) -> None:
    os.truncate(written / "__0_0.distcp", 1000)
    with opened(written) as reader, pytest.raises(CheckpointError, match="model.a.*__0_0.distcp"):
        reader.get("model.a")


def test_a_missing_file_is_named(written: Path) -> None:
    (written / "__0_0.distcp").unlink()
    with opened(written) as reader, pytest.raises(CheckpointError, match="__0_0.distcp.*No such"):
        reader.get("model.b")


@pytest.mark.parametrize("name", [".metadata", "manifest.json"])
def test_a_missing_small_file_is_named(written: Path, name: str) -> None:
    (written / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        opened(written)


@pytest.mark.parametrize("size", [0, 10, 300])
def test_a_truncated_metadata_is_named(written: Path, size: int) -> None:
    os.truncate(written / ".metadata", size)
    with pytest.raises(CheckpointError, match=r"\.metadata is damaged"):
        opened(written)


class Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch hacked",)


@pytest.mark.parametrize("what", [Evil(), os.getcwd, torch.serialization.load])
def test_metadata_cannot_run_code(
    written: Path, monkeypatch: pytest.MonkeyPatch, what: object
) -> None:
    monkeypatch.chdir(written)
    (written / ".metadata").write_bytes(pickle.dumps(what))
    with pytest.raises(CheckpointError, match="which no checkpoint needs"):
        opened(written)
    assert not (written / "hacked").exists()


def test_regions_of_another_checkpoint_are_found(
    written: Path, tmp_path: Path, run_checkpoint: SimpleNamespace
) -> None:
    other = {"model.a": torch.arange(2000.0).int(), "model.b": torch.arange(6.0).reshape(2, 3)}
    run_checkpoint.write(open_storage(tmp_path), "other", other)
    (tmp_path / "other" / "__0_0.distcp").replace(written / "__0_0.distcp")
    with opened(written) as reader, pytest.raises(CheckpointError, match="torch.int32"):
        reader.get("model.a")
