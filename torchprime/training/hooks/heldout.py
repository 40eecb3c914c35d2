"""Held-out loss before the first step, every so many steps, and at the end."""

from __future__ import annotations

import time
from collections.abc import Callable

from torchprime.data.packed import PackedDataset
from torchprime.evaluation.heldout import heldout_loss
from torchprime.metrics.record import EvalRecord
from torchprime.metrics.throughput import Stopwatch
from torchprime.training.backend import Backend
from torchprime.training.loop import BaseHook, CompileGuard


class HeldoutHook(BaseHook):
    """Its time is taken out of the steps' by pausing their stopwatch."""

    def __init__(
        self,
        backend: Backend,
        data: PackedDataset,
        *,
        batch_size: int,
        every_steps: int | None,
        emit: Callable[[EvalRecord], None],
        guard: CompileGuard,
        watch: Stopwatch,
    ) -> None:
        self.backend, self.data = backend, data
        self.batch_size, self.every_steps = batch_size, every_steps
        self.emit, self.guard, self.watch = emit, guard, watch
        self.first: float | None = None
        self.last: float | None = None

    def on_start(self) -> None:
        self._evaluate(0)
        self.first = self.last

    def after_step(self, step: int, last: bool) -> None:
        if last or (self.every_steps is not None and step % self.every_steps == 0):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        self.backend.synchronize()  # steps still under way are the steps' time
        with self.watch.paused():
            started = time.perf_counter()
            with self.guard.watch("held-out step", (self.batch_size, self.data.block_size)):
                self.last = heldout_loss(self.backend, self.data, self.batch_size)
            self.emit(
                EvalRecord(
                    step=step,
                    eval_loss=self.last,
                    eval_supervised_tokens=self.data.supervised_tokens,
                    seconds=time.perf_counter() - started,
                )
            )
