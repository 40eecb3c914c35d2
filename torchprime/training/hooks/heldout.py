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
    """Its time is taken out of the steps' by pausing their stopwatch.

    Args:
        past: the first and the last loss of a run that goes on; it has its first one already.
    """

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
        past: tuple[float | None, float | None] = (None, None),
    ) -> None:
        self.backend, self.data = backend, data
        self.batch_size, self.every_steps = batch_size, every_steps
        self.emit, self.guard, self.watch = emit, guard, watch
        self.first, self.last = past
        self.last_step: int | None = None

    def on_start(self) -> None:
        if self.first is None:
            self._evaluate(0)
            self.first = self.last

    def loss_after(self, step: int) -> float | None:
        """The loss measured after this very step, None if it was not."""
        return self.last if self.last_step == step else None

    def after_step(self, step: int, last: bool) -> None:
        if last or (self.every_steps is not None and step % self.every_steps == 0):
            self._evaluate(step)

    def _evaluate(self, step: int) -> None:
        self.backend.synchronize()  # steps still under way are the steps' time
        with self.watch.paused():
            started = time.perf_counter()
            with self.guard.watch("held-out step", (self.batch_size, self.data.block_size)):
                self.last = heldout_loss(self.backend, self.data, self.batch_size)
            self.last_step = step
            self.emit(
                EvalRecord(
                    step=step,
                    eval_loss=self.last,
                    eval_supervised_tokens=self.data.supervised_tokens,
                    seconds=time.perf_counter() - started,
                )
            )
