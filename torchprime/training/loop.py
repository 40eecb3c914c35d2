"""The training loop of every backend: batches in, updates, records out.

A thread builds the next batches and starts their transfer while the device works. The loop starts
an update and waits for the device only at logged steps. So no code here may read a device value
between logged steps. An event that must not be missed in between (a loss that is not finite) is
detected on the device by the step itself.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.order import batch_indices, steps_per_epoch
from torchprime.data.blocks.replay import ReplayOrder
from torchprime.errors import DivergedError, RecompileError
from torchprime.metrics.goodput import COMPILE, DATA, OTHER, STEP, Ledger
from torchprime.metrics.record import SpikeRecord, StepRecord
from torchprime.metrics.throughput import Stopwatch, host_memory_bytes, mfu
from torchprime.training.backend import Backend, StepNumbers
from torchprime.training.spikes import SpikeOptions

PREFETCHED = 2


class Hook(Protocol):
    """Protocol of a hook around the steps. `step` counts finished updates."""

    def on_start(self) -> None: ...

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int, last: bool) -> None: ...

    def on_record(self, record: StepRecord) -> None: ...

    def on_spike(self, record: SpikeRecord) -> None: ...

    def on_end(self) -> None: ...


class BaseHook:
    """Base class whose methods do nothing; hooks override the ones they need."""

    def on_start(self) -> None: ...

    def before_step(self, step: int) -> None: ...

    def after_step(self, step: int, last: bool) -> None: ...

    def on_record(self, record: StepRecord) -> None: ...

    def on_spike(self, record: SpikeRecord) -> None: ...

    def on_end(self) -> None: ...


@dataclass(frozen=True)
class Loaded:
    """A batch on its way to the device, and the facts that the host needs about it later."""

    device: Any
    shapes: tuple
    batch_hash: str
    supervised_tokens: int
    real_tokens: int
    slot_tokens: int
    source_weights: tuple[float, ...]


@dataclass(frozen=True)
class DataOrder:
    """The order of the data: the batch of a step is a pure function of these fields and the
    step.

    Attributes:
        replay: the order of a run with a schedule of replay.
    """

    data: PackedDataset
    seed: int
    global_batch_size: int
    replay: ReplayOrder | None = None

    def indices(self, step: int) -> npt.NDArray[np.int64]:
        """Return the blocks of the 0-based step."""
        if self.replay is not None:
            return self.replay.blocks(step)
        return batch_indices(self.data.num_blocks, self.seed, step, self.global_batch_size)

    def batch(self, step: int) -> Batch:
        """Return the batch of the 0-based step."""
        return self.data.batch(self.indices(step))

    def epoch(self, steps: int) -> float:
        """Return the epochs of the first so many steps."""
        if self.replay is not None:
            return self.replay.own_passes(steps)
        return steps / self.steps_per_epoch

    @property
    def steps_per_epoch(self) -> int:
        return steps_per_epoch(self.data.num_blocks, self.global_batch_size)


def load_ahead(
    backend: Backend, order: DataOrder, accumulation: int, steps: range
) -> Generator[Loaded, None, None]:
    """Yield the batches of the given steps, built and sent by a thread that stays PREFETCHED
    ahead."""
    ready: queue.Queue[Loaded | BaseException] = queue.Queue(maxsize=PREFETCHED)
    stop = threading.Event()

    def hand_over(item: Loaded | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for step in steps:
                if stop.is_set():
                    return
                batch = order.batch(step)
                hand_over(
                    Loaded(
                        backend.put(batch, accumulation),
                        tuple((f, a.shape, str(a.dtype)) for f, a in batch.arrays().items()),
                        batch.hash(),
                        batch.supervised_tokens,
                        batch.real_tokens,
                        batch.slot_tokens,
                        batch.source_weights(len(order.data.source_names)),
                    )
                )
        except BaseException as error:  # passed on to the loop, which raises it
            hand_over(error)

    thread = threading.Thread(target=work, name="torchprime-loader", daemon=True)
    thread.start()
    try:
        for _ in steps:
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()


@dataclass
class Compiled:
    """The programs that a kind of step compiled, and the seconds of the runs that did."""

    programs: int = 0
    seconds: float = 0.0


class CompileGuard:
    """Guard that lets each kind of step compile in its first two runs; a later compile is an
    error.

    Attributes:
        compiled: the programs so far, by kind of step.
    """

    def __init__(self, backend: Backend, *, allow: bool, ledger: Ledger | None = None) -> None:
        self.backend, self.allow = backend, allow
        self.ledger = ledger or Ledger()  # a run of a step that compiles is time of compiling
        self.runs: dict[str, int] = {}
        self.inputs: dict[str, object] = {}
        self.compiled: dict[str, Compiled] = {}

    @contextmanager
    def watch(self, kind: str, inputs: Any) -> Iterator[None]:
        """Watch one run of a kind of step; `inputs` describes the shapes of its inputs."""
        before, began = self.backend.compiles(), time.perf_counter()
        with self.ledger.at() as span:
            yield
            if self.backend.compiles() != before:
                span.use = COMPILE
                compiled = self.compiled.setdefault(kind, Compiled())
                compiled.programs += self.backend.compiles() - before
                compiled.seconds += time.perf_counter() - began
        run = self.runs[kind] = self.runs.get(kind, 0) + 1
        first = self.inputs.setdefault(kind, inputs)
        if self.backend.compiles() == before or run <= 2 or self.allow:
            return
        if first != inputs:
            reason = f"its inputs changed from {first} to {inputs}"
        else:
            reason = (
                "its inputs have the shapes of the first run, so a value that differs between "
                "steps was traced into the graph as a constant (a Python number, a branch on data)"
            )
        raise RecompileError(
            f"The {kind} compiled again in its run number {run}: {reason}. Make it enter as a "
            "tensor of fixed shape, or set allow_recompile=true to accept the cost of a compile."
        )


@dataclass
class RunControl:
    """The instruments of a run's steps, which the loop shares with its hooks.

    Attributes:
        guard: against a step that compiles again.
        watch: measures the steps; paused for other work.
        ledger: assigns the run's wall clock to its uses.
        stop_reason: set by a hook to end the run after the current step.
    """

    guard: CompileGuard
    watch: Stopwatch
    ledger: Ledger = field(default_factory=Ledger)
    stop_reason: str | None = None


@dataclass(frozen=True)
class TrainLoop:
    """The loop over a run's updates, on any backend.

    Attributes:
        accumulation: micro-batches per update.
        learning_rate: of a 0-based step.
        logging_steps: steps between two records.
        flops_per_token: model FLOPs of a training step per slot token.
    """

    backend: Backend
    order: DataOrder
    accumulation: int
    learning_rate: Callable[[int], float]
    logging_steps: int
    flops_per_token: float
    hooks: Sequence[Hook]
    control: RunControl
    spikes: SpikeOptions | None = None

    def run(self, steps: range) -> StepNumbers:
        """Run these updates and return the last one's numbers; NaN if there are no updates. The
        last one is the run's last unless a hook ends it earlier.

        Raises:
            DivergedError: a loss or gradient norm was not finite; the weights are those before it.
            RecompileError: a step compiled after its second run.
        """
        ledger = self.control.ledger
        try:
            ledger.begin(STEP)
            for hook in self.hooks:
                hook.on_start()
            batches = load_ahead(self.backend, self.order, self.accumulation, steps)
            with closing(batches):  # ends the thread now, even if a traceback refers to it
                return self._run_steps(steps, ledger.each(DATA, batches))
        finally:
            ledger.begin(OTHER)
            for hook in reversed(self.hooks):  # a later hook may need what an earlier one closes
                hook.on_end()

    def _run_steps(self, steps: range, batches: Iterator[Loaded]) -> StepNumbers:
        backend, control = self.backend, self.control
        numbers = StepNumbers(float("nan"), float("nan"), 0.0, 0)
        control.watch.restart()
        for step, loaded in zip(steps, batches, strict=False):  # a hook may end the run earlier
            for hook in self.hooks:
                hook.before_step(step)
            with control.guard.watch("train step", loaded.shapes):
                handle = backend.train_step(loaded.device, self.learning_rate(step))
            control.watch.count(
                supervised_tokens=loaded.supervised_tokens, slot_tokens=loaded.slot_tokens
            )
            done, last = step + 1, step + 1 == steps.stop
            if done % self.logging_steps == 0 or last:
                numbers = self._read(handle)
                self._report_spikes(numbers, after=(done - 1) // self.logging_steps)
                record = self._record(done, loaded, numbers)
                for hook in self.hooks:
                    hook.on_record(record)
            elif step == steps.start:
                # The first step is mostly compiling: it would distort the first record's rates.
                backend.synchronize()
                control.watch.restart()
            for hook in self.hooks:
                hook.after_step(done, last or control.stop_reason is not None)
            if control.stop_reason is not None and not last:
                numbers = self._read(handle)
                self._report_spikes(numbers, after=(done - 1) // self.logging_steps)
                break
        return numbers

    def _read(self, handle: Any) -> StepNumbers:
        """Return a step's numbers. Raise an error with the first bad step, which the device
        remembers, after recomputing its batch."""
        numbers = self.backend.read(handle)
        if not numbers.bad_step:
            return numbers
        batch = self.order.batch(numbers.bad_step - 1)
        raise DivergedError(
            f"The loss or gradient norm of step {numbers.bad_step} is not finite (batch "
            f"{batch.hash()}). No weight was changed by that step or after it. Lower "
            "task.optimizer.learning_rate, set task.max_grad_norm, or look at that batch's rows."
        )

    def _report_spikes(self, numbers: StepNumbers, after: int) -> None:
        """Pass the spikes since the last logged step to the hooks.

        Args:
            after: the last logged step before this one, in units of logging_steps.

        Raises:
            DivergedError: a whole window of updates was skipped in a row.
        """
        options = self.spikes
        if options is None:
            return
        for spike in numbers.spikes:
            if spike.step > after * self.logging_steps:
                batch_hash = self.order.batch(spike.step - 1).hash()
                record = SpikeRecord(*spike, batch_hash=batch_hash, skipped=options.skip)
                for hook in self.hooks:
                    hook.on_spike(record)
        if options.skip and numbers.spikes_in_a_row >= options.window:
            raise DivergedError(
                f"The last {numbers.spikes_in_a_row} updates were spikes and were skipped, at "
                f"least as many as task.spike.window={options.window}: the loss or the gradient "
                "norm stays above its old level. Lower task.optimizer.learning_rate, raise "
                "task.spike.deviations, or set task.spike.action=warn."
            )

    def _record(self, done: int, loaded: Loaded, numbers: StepNumbers) -> StepRecord:
        backend, lap = self.backend, self.control.watch.lap()
        return StepRecord(
            step=done,
            epoch=self.order.epoch(done),
            loss=numbers.loss,
            grad_norm=numbers.grad_norm,
            lr=self.learning_rate(done - 1),
            supervised_tokens=loaded.supervised_tokens,
            real_tokens=loaded.real_tokens,
            slot_tokens=loaded.slot_tokens,
            batch_hash=loaded.batch_hash,
            step_seconds=lap.step_seconds,
            supervised_tokens_per_s=lap.supervised_tokens_per_s,
            slot_tokens_per_s=lap.slot_tokens_per_s,
            mfu=mfu(
                slot_tokens_per_s=lap.slot_tokens_per_s,
                flops_per_token=self.flops_per_token,
                device_kind=backend.device_kind,
                num_chips=backend.device_count,
            ),
            device_memory_bytes=backend.device_memory_bytes(),
            host_memory_bytes=host_memory_bytes(),
            compiles=backend.compiles(),
            source_losses=_by_source(self.order.data.source_names, loaded, numbers),
            terms=numbers.terms or None,
        )


def _by_source(
    names: Sequence[str], loaded: Loaded, numbers: StepNumbers
) -> dict[str, float | None] | None:
    """Return the mean loss of each source's tokens in this step; None for a source without
    tokens."""
    if not numbers.source_loss_sums:
        return None
    trios = zip(names, numbers.source_loss_sums, loaded.source_weights, strict=True)
    return {name: loss / weight if weight else None for name, loss, weight in trios}
