"""The preparation of a run: everything is read, checked and planned; nothing lasting happens.

All checks come before anything slow or permanent: files and vocabulary, rows, mesh and sharding
table, batch budget, the checkpoint to resume from, the places to write to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor

from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.config.schema import TrainConfig
from torchprime.metrics.trackers.choose import require_libraries
from torchprime.sharding import ShardingTable
from torchprime.text.terminal import only_first
from torchprime.training.backend import Backend, StepNumbers
from torchprime.training.evaluating import (
    Choosing,
    Evaluation,
    make_choosing,
    make_evaluation,
    make_graders,
)
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.optim.schedules import Schedule, schedule_note
from torchprime.training.processes import Processes
from torchprime.training.run import resume as resuming
from torchprime.training.run.changes import find_changes, refuse_changes
from torchprime.training.run.export import Exporter
from torchprime.training.run.folder import FolderLock
from torchprime.training.run.outputs import export_place, make_exporter, try_places
from torchprime.training.run.resume import Past, ResumePoint
from torchprime.training.setup.inputs import RunInputs, open_fisher
from torchprime.training.setup.model_files import ModelFiles
from torchprime.training.setup.plan import Plan
from torchprime.training.setup.recipe import files_of, optimizer_of, plan_run, with_adapter

Say = Callable[[str], None]
# Opens the source of initial values: from a weight's name to its tensor.
OpenWeights = Callable[[ModelFiles], Callable[[str], Tensor]]


@dataclass(frozen=True)
class Prepared:
    """A run before its start.

    Attributes:
        lock: of the run's folder.
        open_weights: opens the source of initial values, whose names and shapes are right.
        catalog: of the run's checkpoints.
        point: the checkpoint to start from; None to start at the first step.
        past: the steps before this start.
        export_place: of the export at the end; None if the config asks for none.
        complete: true if every step is done and the export that the config asks for exists.
        say: prints a line for the user, on the first process only.
    """

    inputs: RunInputs
    lock: FolderLock
    open_weights: Callable[[], Callable[[str], Tensor]]
    backend: Backend
    evaluation: Evaluation
    optimizer: Optimizer
    table: ShardingTable
    plan: Plan
    catalog: Catalog
    point: ResumePoint | None
    past: Past
    exporter: Exporter
    export_place: ExportPlace | None
    complete: bool
    say: Say

    @property
    def folder(self) -> Path:
        """The run's folder; before the start it exists only if the run is resumed."""
        return self.lock.folder

    @property
    def config(self) -> TrainConfig:
        return self.inputs.config

    @property
    def choosing(self) -> Choosing:
        return self.evaluation.choosing

    @property
    def stopped_early(self) -> bool:
        """True if the run that is resumed ended early, after its last step."""
        return self.past.stopped_early(self.choosing.stopping)

    def learning_rate(self) -> Callable[[int], float]:
        """Return the learning rate of each 0-based step."""
        o, s = self.config.task.optimizer, self.config.task.lr_scheduler
        return Schedule(
            s.name,
            o.learning_rate,
            self.plan.total_steps,
            warmup_steps=self.plan.warmup_steps,
            min_lr_ratio=s.min_lr_ratio,
            decay_steps=self.plan.decay_steps,
            decay_shape=s.decay_shape or "linear",
            cycles=s.cycles or 1,
        ).rate

    def numbers_before(self) -> StepNumbers | None:
        """Return the last numbers in the records before this start, if there are any."""
        return resuming.last_numbers(self.folder / resuming.METRICS, self.past.step)


def prepare(
    config: TrainConfig,
    make_backend: Callable[[TrainConfig], Backend],
    open_weights: OpenWeights,
    lock: FolderLock,
    say: Say,
) -> Prepared:
    """Read and check everything except the weights' values.

    Args:
        make_backend: called once the config and the data are known to be right.
        lock: of the run's folder; taken here if the folder exists.
        say: prints a line for the user.
    """
    inputs, evaluation, catalog = _read(config, open_weights, lock.folder, only_first(say))
    backend = make_backend(inputs.config)
    say = only_first(say, backend.processes.index == 0)
    optimizer = optimizer_of(config)
    table, plan = plan_run(inputs.config, inputs.files, inputs.rows, optimizer)
    backend.check(inputs.model(), table)
    inputs = _with_base(inputs, backend.processes)
    point = None if config.dry_run else _find_point(inputs, backend.processes, catalog, lock, say)
    past = Past() if point is None else point.past()
    to_export = export_place(config, lock.folder, backend.processes.count)
    is_complete = partial(_is_complete, point, past, plan, evaluation.choosing, to_export)
    prepared = Prepared(
        inputs=inputs,
        lock=lock,
        open_weights=partial(open_weights, inputs.files),
        backend=backend,
        evaluation=evaluation,
        optimizer=optimizer,
        table=table,
        plan=plan,
        catalog=catalog,
        point=point,
        past=past,
        exporter=make_exporter(inputs, say),
        export_place=to_export,
        complete=backend.processes.first_does(is_complete),
        say=say,
    )
    _check_outputs(prepared)
    _say_plan(prepared)
    return prepared


def _read(
    config: TrainConfig, open_weights: OpenWeights, folder: Path, say: Say
) -> tuple[RunInputs, Evaluation, Catalog]:
    """Read files, rows and prompts, once it is known that the folder's run can go on."""
    c = config
    require_libraries(c.metrics.trackers)
    choosing, graders = make_choosing(c), make_graders(c.eval)
    storage = open_storage(resuming.checkpoints_place(folder, c.checkpoint.folder))
    catalog = Catalog(storage, choosing.rule.rank)
    if not c.dry_run:
        resuming.may_go_on(c.resume.source, folder, catalog)
    files = files_of(c, weights=not c.dry_run)
    c = with_adapter(c, files, say)
    if not c.dry_run:
        open_weights(files)  # checks names and shapes
    fisher = open_fisher(c.regularization, files)
    longest = files.architecture.max_position_embeddings
    if c.dataset.block_size > longest:
        say(
            f"note: dataset.block_size={c.dataset.block_size} is beyond the model's "
            f"max_position_embeddings={longest}; positions past it were never trained."
        )
    inputs = RunInputs.read(c, files, resuming.recorded_date(c.resume.source, catalog), say)
    inputs = replace(inputs, fisher=fisher)
    return inputs, make_evaluation(inputs, choosing, graders, folder), catalog


def _with_base(inputs: RunInputs, processes: Processes) -> RunInputs:
    """Return the inputs with the fingerprint of the base, which the first process computes, if the
    run's checkpoints are worth nothing with another one. The Fisher information is of that base."""
    config, fisher = inputs.config, inputs.fisher
    needed = inputs.files.adapter is not None or config.regularization.enabled
    if not needed or config.dry_run:
        return inputs
    base = processes.first_does(inputs.files.base_fingerprint)
    if fisher is not None:
        processes.first_does(partial(fisher.check_values, base))
    return replace(inputs, base=base)


def _find_point(
    inputs: RunInputs, processes: Processes, catalog: Catalog, lock: FolderLock, say: Say
) -> ResumePoint | None:
    """Find the checkpoint to start from; all differences from it are reported, or refused."""
    c = inputs.config
    processes.first_does(lock.take_if_there)
    point = resuming.agree_on_point(processes, c.resume.source, catalog, say)
    if point is None:
        return None
    older = {"model": inputs.files.older_fingerprint()}
    changes = find_changes(point.reader.manifest, c.to_dict(), inputs.identity(), older)
    refuse_changes(changes, c.resume.allow_changes, point.where)
    say(f"resuming from {point.where}")
    for change in changes:
        say(f"  {change.describe()}")
    return point


def _is_complete(
    point: ResumePoint | None,
    past: Past,
    plan: Plan,
    choosing: Choosing,
    place: ExportPlace | None,
) -> bool:
    if point is None or not point.own:
        return False
    if past.step < plan.total_steps and not past.stopped_early(choosing.stopping):
        return False
    return place is None or place.is_there()


def _check_outputs(prepared: Prepared) -> None:
    """Check now that the outputs of the run can be written."""
    p, config = prepared, prepared.config
    place = None if p.complete else p.export_place
    p.backend.processes.first_does(
        partial(try_places, p.inputs, p.folder, p.catalog.storage, p.optimizer, p.exporter, place)
    )
    if config.saves and not config.dry_run:
        resuming.check_shared(p.backend.processes, p.catalog.storage)


def _say_plan(prepared: Prepared) -> None:
    p, files, config = prepared, prepared.inputs.files, prepared.config
    p.say(p.plan.describe())
    peak, total = config.task.optimizer.learning_rate, p.plan.total_steps
    if note := schedule_note(p.learning_rate(), peak=peak, total_steps=total):
        p.say(f"note: {note}")
    if note := files.left_out():
        p.say(f"note: {note}")
    for line in files.vocabulary.describe() if files.vocabulary else ():
        p.say(f"  {line}")
    p.say(f"  attention    {p.backend.attention} ({p.backend.attention_why})")
    p.say(f"  loss         {p.backend.loss} ({p.backend.loss_why})")
    if described := config.task.loss.describe():
        p.say(f"  minimized    {described}")
    if described := config.regularization.describe():
        p.say(f"  near base    {described}")
    if config.task.neftune_noise_alpha is not None:
        p.say(f"  noise        on embeddings, alpha {config.task.neftune_noise_alpha:g} (NEFTune)")
