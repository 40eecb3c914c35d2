"""Tensors written in any sharding are read back in any other.

They equal plain torch tensors, and the tensors that torch's own tools read from the same files.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from torchprime.checkpoint.run import shards as shards_module
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.checkpoint.run.shards import TensorShards, write_shards
from torchprime.checkpoint.run.storage import FolderWriter, Storage
from torchprime.errors import CheckpointError


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {
        "model.embed.weight": torch.randn(10, 6, generator=generator),
        "model.norm.weight": torch.randn(7, generator=generator).bfloat16(),
        "optimizer.step": torch.tensor(5, dtype=torch.int64),
        "optimizer.exp_avg.w": torch.randn(4, 3, 5, generator=generator).double(),
    }


def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def merged(name: str, tensor: torch.Tensor, parts: Any, helper: SimpleNamespace) -> TensorShards:
    """All parts held by one process, as one host with several devices has them."""
    pieces = helper.cut(name, tensor, parts)
    chunks = [chunk for piece in pieces for chunk in piece.chunks]
    return TensorShards(
        name,
        tuple(tensor.shape),
        tensor.dtype,
        chunks,
        lambda: [value for piece in pieces for value in piece.read()],
    )


def write_all(
    storage: Storage, shards: list[TensorShards], helper: SimpleNamespace
) -> CheckpointReader:
    with storage.create("step") as writer:
        write_shards(writer, shards)
        helper.finish(writer)
    return CheckpointReader(storage, "step")


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_tensors_come_back(
    storage: Storage, tensors: dict[str, torch.Tensor], run_checkpoint: SimpleNamespace, parts: int
) -> None:
    shards = [
        merged(name, tensor, (parts,) * tensor.dim(), run_checkpoint)
        for name, tensor in tensors.items()
    ]
    with write_all(storage, shards, run_checkpoint) as reader:
        assert reader.tensor_names() == list(tensors)
        for name, tensor in tensors.items():
            assert reader.shape(name) == tuple(tensor.shape) and reader.dtype(name) == tensor.dtype
            assert equal(reader.get(name), tensor)


def test_any_region_comes_back(
    storage: Storage, tensors: dict[str, torch.Tensor], run_checkpoint: SimpleNamespace
) -> None:
    tensor = tensors["model.embed.weight"]
    shards = [merged("w", tensor, (3, 2), run_checkpoint)]
    with write_all(storage, shards, run_checkpoint) as reader:
        for rows in range(1, 11):
            for start in range(11 - rows):
                found = reader.get("w", ((start, 1), (rows, 4)))
                assert equal(found, tensor[start : start + rows, 1:5])


def test_torch_reads_it_too(
    tmp_path: Path, tensors: dict[str, torch.Tensor], run_checkpoint: SimpleNamespace
) -> None:
    shards = [
        merged(name, tensor, (2,) * tensor.dim(), run_checkpoint)
        for name, tensor in tensors.items()
    ]
    write_all(open_storage(tmp_path), shards, run_checkpoint)
    dcp_to_torch_save(tmp_path / "step", tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert set(plain) == set(tensors)
    assert all(equal(plain[name], tensor) for name, tensor in tensors.items())


class Processes:
    """Threads that stand for processes: each has its own writer; gathering waits for all."""

    def __init__(self, storage: Storage, count: int, finish: Callable[..., None]) -> None:
        self.storage, self.count, self.finish = storage, count, finish
        self.barrier = threading.Barrier(count, timeout=60)
        self.slots: list[Any] = [None] * count
        self.errors: list[Exception | None] = [None] * count
        self.files: list[dict[str, Any]] = [{}] * count

    def run(self, shards: list[list[TensorShards]]) -> None:
        threads = [
            threading.Thread(target=self._process, args=(index, shards[index]))
            for index in range(self.count)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _gather(self, index: int, mine: Any) -> list[Any]:
        self.slots[index] = mine
        self.barrier.wait()
        everything = list(self.slots)
        self.barrier.wait()
        return everything

    def _process(self, index: int, shards: list[TensorShards]) -> None:
        try:
            with self.storage.create("step", main=index == 0) as writer:
                self.files[index] = writer.files
                write_shards(
                    writer,
                    shards,
                    process_index=index,
                    process_count=self.count,
                    gather=lambda mine: self._gather(index, mine),
                )
                if index == 0:
                    self.finish(writer)
        except Exception as error:
            self.errors[index] = error


def test_replicas_are_written_once(storage: Storage, run_checkpoint: SimpleNamespace) -> None:
    """Two processes hold all of one tensor, and each its half of another, on two devices each."""
    whole, halved = torch.randn(6, 4), torch.randn(8, 2)
    reads: list[tuple[int, str]] = []

    def noted(process: int, shards: TensorShards) -> TensorShards:
        def read() -> list[torch.Tensor]:
            reads.append((process, shards.name))
            return shards.read()

        return replace(shards, read=read)

    def held(process: int) -> list[TensorShards]:
        part = run_checkpoint.cut("halved", halved, (2, 1))[process]
        twice = TensorShards(
            "halved", part.shape, part.dtype, part.chunks * 2, lambda: part.read() * 2
        )
        return [
            noted(process, merged("whole", whole, (1, 1), run_checkpoint)),
            noted(process, twice),
        ]

    processes = Processes(storage, 2, run_checkpoint.finish)
    processes.run([held(0), held(1)])
    assert processes.errors == [None, None]
    with CheckpointReader(storage, "step") as reader:
        assert equal(reader.get("whole"), whole) and equal(reader.get("halved"), halved)
        assert sorted(reads) == [(0, "halved"), (0, "whole"), (1, "halved")]
        files = reader.manifest.files
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata"} == set(files)
    one_part = 8 * 2 // 2 * 4
    assert files["__1_0.distcp"]["bytes"] < one_part + 2000  # one tensor of it, with its archive


def test_a_process_that_fails_ends_all(storage: Storage, run_checkpoint: SimpleNamespace) -> None:
    parts = run_checkpoint.cut("w", torch.randn(6, 4), (2, 1))

    def broken() -> list[torch.Tensor]:
        raise CheckpointError("its disk is full")

    bad = replace(parts[1], read=broken)
    processes = Processes(storage, 2, run_checkpoint.finish)
    processes.run([[parts[0]], [bad]])
    assert "Process 1 could not write its part: its disk is full" in str(processes.errors[0])
    assert "its disk is full" in str(processes.errors[1])
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        CheckpointReader(storage, "step")


def test_a_hole_is_our_mistake(storage: Storage, run_checkpoint: SimpleNamespace) -> None:
    first = run_checkpoint.cut("w", torch.randn(6, 4), (2, 1))[0]
    with pytest.raises(ValueError, match="w hold 12 of its 24"), storage.create("step") as writer:
        write_shards(writer, [first])


def test_one_tensor_is_in_memory_at_a_time(
    storage: Storage, run_checkpoint: SimpleNamespace
) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []

    def read() -> list[torch.Tensor]:
        assert not [ref for ref in alive if ref() is not None], "the one before is still there"
        values = [torch.randn(3, 2), torch.randn(3, 2)]
        alive.extend(weakref.ref(value) for value in values)
        return values

    chunks = [((0, 0), (3, 2)), ((3, 0), (3, 2))]
    shards = [TensorShards(f"w{i}", (6, 2), torch.float32, chunks, read) for i in range(4)]
    write_all(storage, shards, run_checkpoint)
    assert len(alive) == 8


@pytest.fixture
def three_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a large checkpoint on a machine with cores enough."""
    monkeypatch.setattr(shards_module, "SMALLEST_FILE", 100)
    monkeypatch.setattr(shards_module, "MOST_FILES", 3)
    monkeypatch.setattr(shards_module.os, "cpu_count", lambda: 8)


@pytest.mark.usefixtures("three_files")
def test_what_is_large_goes_into_several_files(
    tmp_path: Path, run_checkpoint: SimpleNamespace
) -> None:
    tensors = {f"w{i}": torch.randn(10 + i, 4) for i in range(7)}
    alive: list[weakref.ref[torch.Tensor]] = []

    def reading(tensor: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
        def read() -> list[torch.Tensor]:
            assert len([ref for ref in alive if ref() is not None]) < 3, "more than one a file"
            value = tensor.clone()
            alive.append(weakref.ref(value))
            return [value]

        return read

    shards = [
        TensorShards(name, tuple(w.shape), w.dtype, [((0, 0), tuple(w.shape))], reading(w))
        for name, w in tensors.items()
    ]
    with write_all(open_storage(tmp_path), shards, run_checkpoint) as reader:
        assert all(equal(reader.get(name), tensor) for name, tensor in tensors.items())
        files = {name: facts["bytes"] for name, facts in reader.manifest.files.items()}
    assert sorted(files) == [".metadata", "__0_0.distcp", "__0_1.distcp", "__0_2.distcp"]
    dcp_to_torch_save(tmp_path / "step", tmp_path / "plain.pt")
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    assert all(equal(plain[name], tensor) for name, tensor in tensors.items())


@pytest.mark.usefixtures("three_files")
def test_a_file_that_fails_fails_all(storage: Storage, run_checkpoint: SimpleNamespace) -> None:
    def broken() -> list[torch.Tensor]:
        raise CheckpointError("the device is gone")

    chunk = [((0, 0), (10, 4))]
    whole = [TensorShards(f"w{i}", (10, 4), torch.float32, chunk, lambda: [torch.ones(10, 4)])
             for i in range(4)]  # fmt: skip
    with pytest.raises(CheckpointError, match="the device is gone"):
        write_all(storage, [*whole, replace(whole[0], name="bad", read=broken)], run_checkpoint)
    with pytest.raises(CheckpointError, match="not a whole checkpoint"):
        CheckpointReader(storage, "step")


def test_a_view_is_written_without_what_it_views(
    storage: Storage, run_checkpoint: SimpleNamespace
) -> None:
    large = torch.randn(1000, 100)
    view = TensorShards("w", (2, 3), large.dtype, [((0, 0), (2, 3))], lambda: [large[:2, :3]])
    turned = TensorShards("t", (3, 2), large.dtype, [((0, 0), (3, 2))], lambda: [large[:2, :3].T])
    with write_all(storage, [view, turned], run_checkpoint) as reader:
        assert equal(reader.get("w"), large[:2, :3]) and equal(reader.get("t"), large[:2, :3].T)
        assert reader.manifest.files["__0_0.distcp"]["bytes"] < 4000


def test_another_dtype_than_planned_is_our_mistake(
    storage: Storage, run_checkpoint: SimpleNamespace
) -> None:
    wrong = TensorShards(
        "w", (2,), torch.float32, [((0,), (2,))], lambda: [torch.zeros(2).double()]
    )
    with pytest.raises(AssertionError, match="w: torch.float64"):
        write_all(storage, [wrong], run_checkpoint)


def test_nothing_to_write_is_no_file(storage: Storage, run_checkpoint: SimpleNamespace) -> None:
    writer: FolderWriter
    with storage.create("step") as writer:
        write_shards(writer, [])
        run_checkpoint.finish(writer)
    assert list(writer.files) == [".metadata", "manifest.json"]
