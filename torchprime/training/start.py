"""The start of a prepared run: weights are placed, its folder is opened, its hooks are made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from torchprime.evaluation.behaviour import EVALUATIONS
from torchprime.files.atomic import clear_temporary, write_json
from torchprime.files.private_folders import own_folder
from torchprime.metrics.goodput import Ledger
from torchprime.metrics.throughput import Stopwatch
from torchprime.metrics.writers import ConsoleWriter, JsonlWriter, Writer
from torchprime.training.backend import StepNumbers
from torchprime.training.hooks.checkpoint import CheckpointHook, SaveSchedule
from torchprime.training.hooks.evaluation import EvaluationHook, HeldOut
from torchprime.training.hooks.metrics import MetricsHook
from torchprime.training.hooks.profiling import ProfileHook
from torchprime.training.hooks.snapshots import Snapshots
from torchprime.training.hooks.times import TimesHook
from torchprime.training.loop import CompileGuard, Hook, RunControl, TrainLoop
from torchprime.training.prepare import Prepared
from torchprime.training.regularization.penalty import AnchorSource
from torchprime.training.run import folder as run_folder
from torchprime.training.run import resume as resuming
from torchprime.training.run.facts import run_facts
from torchprime.training.run.saver import Retention, Saver
from torchprime.training.run.tracking import Tracking, start_tracking
from torchprime.training.setup.plan import data_order, flops_per_token
from torchprime.training.setup.probe import probe_isolation
from torchprime.training.setup.recipe import spike_options, step_options


@dataclass(frozen=True)
class Run:
    """A run that was started: weights are on the devices, and its folder is its own.

    Attributes:
        saver: None for a run without checkpoints.
        times: the account of the run's wall clock.
    """

    prepared: Prepared
    loop: TrainLoop
    snapshots: Snapshots
    saver: Saver | None
    tracking: Tracking
    times: TimesHook

    def train(self) -> StepNumbers:
        """Run the remaining steps and return the last one's numbers.

        Raises:
            DivergedError, RecompileError: see `TrainLoop.run`.
        """
        p = self.prepared
        first = p.past.step
        last = first if p.stopped_early else p.plan.total_steps
        numbers = self.loop.run(range(first, last))
        return p.numbers_before() or numbers if first >= last else numbers


def start(prepared: Prepared, ledger: Ledger) -> Run:
    """Place the weights, then create the run's folder: an error in between leaves no folder.

    Args:
        ledger: of the run's wall clock.
    """
    _place_weights(prepared)
    _seed(prepared)
    prepared.backend.processes.first_does(partial(_make_folder, prepared))
    return _make_run(prepared, ledger)


def _place_weights(prepared: Prepared) -> None:
    p, point = prepared, prepared.point
    config, inputs, backend = p.config, p.inputs, p.backend
    # Its mapped files are closed at the end of this function.
    adapter = inputs.files.adapter is not None
    base = p.open_weights() if config.regularization.runs_base(adapter=adapter) else None
    backend.place(inputs.model(), p.table, _values(p), inputs.dtype, base)
    backend.prepare_training(
        p.optimizer,
        step_options(config, len(inputs.rows.train.source_names)),
        None if point is None else point.state(),
        _anchors(p),
    )
    if config.isolation_probe:
        vocab = inputs.files.architecture.vocab_size
        told = probe_isolation(backend, inputs.rows.train, inputs.micro_batch_size, vocab)
        p.say(f"  {told}")


def _anchors(prepared: Prepared) -> AnchorSource | None:
    """Return the source of the values that hold the weights near the base, also on a resume: no
    checkpoint has them."""
    p, fisher = prepared, prepared.inputs.fisher
    if p.config.regularization.penalty is None:
        return None
    return AnchorSource(p.open_weights(), None if fisher is None else fisher.get)


def _values(prepared: Prepared) -> Callable[[str], Tensor]:
    """Return the source of the parameters' values by name: checkpoint, base and new ones."""
    p, inputs, point = prepared, prepared.inputs, prepared.point
    trained = None if point is None else point.weight
    return inputs.values(p.open_weights, trained)


def _seed(prepared: Prepared) -> None:
    """Restore the random states of the checkpoint, or seed them."""
    backend, seed = prepared.backend, prepared.config.seed
    if prepared.point is None:
        resuming.seed_rng(seed)
        backend.seed(seed)
        return
    manifest = prepared.point.reader.manifest
    resuming.restore_rng(manifest.rng)
    if manifest.backend == backend.name:
        resuming.restore_device(backend, manifest.rng)


def _make_folder(prepared: Prepared) -> None:
    with run_folder.writing(prepared.folder):
        _open_folder(prepared)


def _open_folder(prepared: Prepared) -> None:
    """Create the run's folder, or continue it."""
    p, folder, first_step = prepared, prepared.folder, prepared.past.step
    if p.point is not None and p.point.own:
        resuming.cut_metrics(folder / resuming.METRICS, first_step)
        resuming.cut_evaluations(folder / EVALUATIONS, first_step)
        p.catalog.set_aside_after(first_step, p.say)
    elif resuming.died_early(folder):
        resuming.set_aside(folder, p.say)
    else:
        run_folder.claim(folder)
        p.lock.take()
    p.catalog.clean()
    clear_temporary(folder)
    run_folder.write_config(folder, p.config.to_dict())
    write_json(folder / "data_report.json", p.inputs.rows.reports())
    run_folder.write_facts(folder, run_facts(p), first_step)


def _make_run(prepared: Prepared, ledger: Ledger) -> Run:
    """Make the loop with its hooks. Checkpoints come after all other hooks of the same step."""
    p, config, files = prepared, prepared.config, prepared.inputs.files
    guard = CompileGuard(p.backend, allow=config.allow_recompile, ledger=ledger)
    control = RunControl(guard, Stopwatch(), ledger)
    tracking = start_tracking(p)
    metrics = MetricsHook(_writers(p, tracking))
    times = TimesHook(ledger, None if p.backend.processes.index else p.folder, p.past.step)
    hooks: list[Hook] = [metrics, times]
    evaluations = _evaluations(p, metrics, control)
    if evaluations is not None:
        hooks.append(evaluations)
    if config.profile_start_step is not None and config.profile_end_step is not None:
        folder = config.profile_dir or str(own_folder(p.folder, "profile", "output_dir"))
        first, end = config.profile_start_step, config.profile_end_step
        hooks.append(ProfileHook(p.backend, start=first, end=end, folder=folder))
    snapshots = Snapshots(p, metrics, evaluations)
    saver = make_saver(p) if config.saves else None
    if saver is not None:
        hooks.append(_checkpoints(saver, snapshots, metrics, times))
    loop = TrainLoop(
        p.backend,
        data_order(config, p.inputs.rows.train, p.plan.total_steps),
        accumulation=config.task.gradient_accumulation_steps,
        learning_rate=p.learning_rate(),
        logging_steps=config.logging_steps,
        flops_per_token=flops_per_token(
            files.architecture, p.plan.parameters, config.dataset.block_size
        ),
        hooks=hooks,
        control=control,
        spikes=spike_options(config),
    )
    return Run(p, loop, snapshots, saver, tracking, times)


def _writers(prepared: Prepared, tracking: Tracking) -> list[Writer]:
    if prepared.backend.processes.index != 0:
        return []
    folder, first_step = prepared.folder, prepared.past.step
    return [
        JsonlWriter(folder / resuming.METRICS),
        *tracking.senders,
        ConsoleWriter(prepared.plan.total_steps, first_step),
    ]


def _evaluations(
    prepared: Prepared, metrics: MetricsHook, control: RunControl
) -> EvaluationHook | None:
    p, rows = prepared, prepared.inputs.rows.heldout
    if rows is None:
        return None
    return EvaluationHook(
        p.backend,
        HeldOut(rows, p.inputs.micro_batch_size, p.config.eval.every_steps),
        p.evaluation,
        control,
        p.past,
        emit=metrics.emit,
        say=p.say,
    )


def _checkpoints(
    saver: Saver, snapshots: Snapshots, metrics: MetricsHook, times: TimesHook
) -> CheckpointHook:
    p, config = snapshots.prepared, snapshots.prepared.config
    schedule = SaveSchedule(
        every_steps=config.checkpoint.every_steps,
        every_minutes=config.checkpoint.every_minutes,
        best=config.export.which == "best",
        logging_steps=config.logging_steps,
    )
    return CheckpointHook(p.backend, saver, snapshots, schedule, p.folder, times, metrics.emit)


def make_saver(prepared: Prepared) -> Saver:
    """Return a writer of the run's checkpoints."""
    p, c = prepared, prepared.config.checkpoint
    best = None
    if p.point is not None and p.point.own:
        # By the present rule; the first process finds it and updates the pointer too.
        best = p.backend.processes.first_does(p.catalog.point_to_best)
    return Saver(
        p.backend,
        p.catalog,
        retention=Retention(c.keep_last, c.keep_best, c.keep_every),
        asynchronous=c.asynchronous,
        best=best,
        say=p.say,
    )
