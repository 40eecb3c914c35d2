"""The writer of a run's checkpoints: from tensors on devices to a whole folder, during training.

The current steps are finished and the shards of this process are copied to host memory; training
pauses only for that. A thread then writes and hashes them, and the folder gets its
manifest and its name last. With `asynchronous=false`, and where the run waits anyway, nothing is
copied ahead: tensors are fetched and written one after the other, so host memory holds one at a
time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from torchprime.checkpoint.run.catalog import BEST, LATEST, Catalog
from torchprime.checkpoint.run.manifest import BestCheckpoint
from torchprime.checkpoint.run.shards import TensorShards, write_shards
from torchprime.checkpoint.run.storage import MANIFEST
from torchprime.errors import CheckpointError, UserError
from torchprime.metrics.record import CheckpointRecord
from torchprime.training.backend import Backend
from torchprime.training.run.snapshot import Snapshot


@dataclass(frozen=True)
class Retention:
    """The checkpoints to retain: the newest, the best, and every N steps."""

    keep_last: int | None
    keep_best: int
    keep_every: int | None


class Saver:
    """Writer of the checkpoints of one run, one at a time.

    Args:
        best: the best existing checkpoint, None for none.
    """

    def __init__(
        self,
        backend: Backend,
        catalog: Catalog,
        *,
        retention: Retention,
        asynchronous: bool,
        best: BestCheckpoint | None,
        say: Callable[[str], None],
    ) -> None:
        self.backend, self.catalog = backend, catalog
        self.retention, self.asynchronous = retention, asynchronous
        self.processes = backend.processes.aside
        self.best = best  # of the checkpoints that are whole
        self._candidate: BestCheckpoint | None = None  # the one being written, if it is better
        self.say = say
        self.problem: Exception | None = None  # error of the last checkpoint
        self._bug: Exception | None = None
        self._thread: threading.Thread | None = None
        self._copies: dict[str, list[Tensor]] = {}
        self._reserving: threading.Thread | None = None
        self._finished: list[CheckpointRecord] = []

    def reserve(self) -> None:
        """Start to allocate the host memory for asynchronous checkpoints: the first use of a page
        costs several times the copy into it, so the first checkpoint would pause training for as
        long as writing it takes."""
        if not self.asynchronous:
            return
        live = [shards for shards in self.backend.checkpoint_tensors() if shards.live]

        def take() -> None:
            for shards in live:
                sizes = [size for _, size in shards.chunks]
                self._copies[shards.name] = [torch.zeros(s, dtype=shards.dtype) for s in sizes]

        self._reserving = threading.Thread(target=take, name="checkpoint-memory", daemon=True)
        self._reserving.start()

    def save(self, snapshot: Snapshot, *, wait: bool) -> None:
        """Start a checkpoint; finish it too if `wait` is true."""
        step, scores = snapshot.step, snapshot.scores
        started = time.perf_counter()
        self._join()
        updates, bad = self.backend.progress()
        if bad:  # the loop reports it at the next logged step; these weights are saved elsewhere
            return
        assert updates == step, f"the device has done {updates} updates, the loop {step}"
        better = self.is_best(scores)
        self._candidate = {"scores": dict(scores), "step": step} if better else None
        best = self._candidate or self.best
        snapshot = replace(snapshot, manifest=replace(snapshot.manifest, best_metric=best))
        tensors = self.backend.checkpoint_tensors()
        if wait or not self.asynchronous:
            self._write(snapshot, tensors, started, None)
            return self._join()
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        tensors = [self._on_host(shards) for shards in tensors]
        stall = time.perf_counter() - started
        arguments = (snapshot, tensors, started, stall)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint")
        self._thread.start()

    def is_best(self, scores: Mapping[str, float]) -> bool:
        """Return True if these scores are better than those of every checkpoint, including the
        unfinished one."""
        rank = self.catalog.rank(scores)
        known = [self.catalog.rank(each["scores"]) for each in (self.best, self._candidate) if each]
        return rank is not None and all(other is None or rank < other for other in known)

    def _write(
        self,
        snapshot: Snapshot,
        tensors: Sequence[TensorShards],
        started: float,
        stall: float | None,
    ) -> None:
        """Write a checkpoint. An error is reported and kept, because a run is worth more than a
        copy."""
        try:
            size = self._write_folder(snapshot, tensors)
        except Exception as error:
            self.problem, self._candidate = error, None
            if not isinstance(error, (UserError, OSError)):  # our own bug: raised by `_join`
                self._bug = error
            self.say(f"checkpoint of step {snapshot.step} NOT written: {error}")
            return
        self.problem = None
        self.best, self._candidate = self._candidate or self.best, None
        took = time.perf_counter() - started
        stood = took if stall is None else stall
        name = self.catalog.name_of(snapshot.step)
        self._finished.append(CheckpointRecord(snapshot.step, name, size, stood, took))
        self.say(
            f"  checkpoint {name}: {size / 1e6:,.1f} MB in {took:.2f} s, "
            f"training stood still for {stood:.2f} s"
        )

    def _write_folder(self, snapshot: Snapshot, tensors: Sequence[TensorShards]) -> int:
        """Write the shards of this process; the first process also completes the folder. Return its
        size.

        An error on one process is raised on all of them, at the same place.
        """
        storage, name = self.catalog.storage, self.catalog.name_of(snapshot.step)
        processes = self.processes
        with ExitStack() as stack:
            main = processes.index == 0
            writer = processes.each_does(
                lambda: stack.enter_context(storage.create(name, main=main))
            )
            write_shards(
                writer,
                tensors,
                process_index=processes.index,
                process_count=processes.count,
                gather=processes.gather,
            )

            def complete() -> int:
                snapshot.complete(writer)
                files = dict(writer.files)
                manifest = replace(snapshot.manifest, files=files)
                writer.write_bytes(MANIFEST, manifest.to_bytes())
                stack.close()
                self._point_and_retain(name)
                return sum(entry["bytes"] for entry in files.values())

            return processes.first_does(complete)

    def _point_and_retain(self, name: str) -> None:
        self.catalog.point(LATEST, name)
        best = self._candidate or self.best
        if best is not None:  # each time: a kill may have come before the pointer was written
            self.catalog.point(BEST, self.catalog.name_of(best["step"]))
        keep = self.retention
        self.catalog.retain(keep.keep_last, keep.keep_best, keep.keep_every)

    def finished(self) -> list[CheckpointRecord]:
        """Return the checkpoints that became whole since the last call."""
        found, self._finished = self._finished, []
        return found

    def close(self) -> None:
        """Wait for the unfinished checkpoint."""
        self._join()

    def require(self) -> None:
        """Raise the error of the last checkpoint, if it could not be written."""
        self._join()
        if self.problem is not None:
            raise CheckpointError(f"the last checkpoint could not be written: {self.problem}")

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug

    def _on_host(self, shards: TensorShards) -> TensorShards:
        """Return the same tensors with their chunks copied to host memory that no update changes.

        The memory of the copies is reused for the next checkpoint (see `reserve`). References to
        the originals are dropped.
        """
        chunks = shards.read()
        if shards.live:
            if shards.name not in self._copies:
                empty = [torch.empty_like(chunk, device="cpu") for chunk in chunks]
                self._copies[shards.name] = empty
            for copy, chunk in zip(self._copies[shards.name], chunks, strict=True):
                copy.copy_(chunk)
            chunks = list(self._copies[shards.name])

        def read() -> list[Tensor]:
            handed = list(chunks)
            chunks.clear()
            return handed

        return replace(shards, read=read, live=False)
