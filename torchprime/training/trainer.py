"""The trainer: the order of steps from a config to a trained model.

All checks come before anything slow or permanent: files and vocabulary, rows, mesh and sharding
table, batch budget, export target. Only then is the run's folder created and are weights loaded.
Called functions get flat arguments, no config objects.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprime.checkpoint.from_checkpoint import export_checkpoint
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.source import hub_name
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.places import ExportPlace, LocalPlace
from torchprime.checkpoint.room import Need, require_room
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.local_storage import LocalStorage
from torchprime.checkpoint.run.lock import run_lock
from torchprime.checkpoint.run.manifest import Manifest
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.storage import FolderWriter
from torchprime.config.paths import is_url
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError, DivergedError, UserError
from torchprime.evaluation.before_after import table_lines
from torchprime.evaluation.behaviour import EVALUATIONS
from torchprime.files.atomic import clear_temporary, write_json
from torchprime.files.private_folders import own_folder
from torchprime.metrics.throughput import Stopwatch
from torchprime.metrics.writers import ConsoleWriter, JsonlWriter, TensorBoardWriter, Writer
from torchprime.report.write import write_report
from torchprime.text import terminal
from torchprime.training.backend import Backend, StepNumbers
from torchprime.training.evaluating import make_choosing, make_evaluation, make_graders
from torchprime.training.hooks.checkpoint import CheckpointHook
from torchprime.training.hooks.evaluation import EvaluationHook, HeldOut
from torchprime.training.hooks.metrics import MetricsHook
from torchprime.training.hooks.profiling import ProfileHook
from torchprime.training.loop import CompileGuard, DataOrder, Hook, RunControl, TrainLoop
from torchprime.training.optim import learning_rate, schedule_note
from torchprime.training.run import folder as run_folder
from torchprime.training.run import resume as resuming
from torchprime.training.run.changes import find_changes, refuse_changes
from torchprime.training.run.export import Exporter
from torchprime.training.run.facts import make_manifest, metrics_at, run_facts
from torchprime.training.run.final_export import FinalExport
from torchprime.training.run.resume import Past, ResumePoint
from torchprime.training.run.saver import Retention, Saver
from torchprime.training.setup.datasets import prepare_run_data, template_of
from torchprime.training.setup.model_files import pretrained_tensors, random_tensors
from torchprime.training.setup.plan import checkpoint_bytes, flops_per_token
from torchprime.training.setup.probe import probe_isolation
from torchprime.training.setup.recipe import files_of, optimizer_of, plan_run, step_options


class Trainer:
    """Trainer of the config's run (task=train). `SFTTrainer` adds loading before and export after.

    Args:
        config: checked by the schema.
        make_backend: called once the config and the data are known to be right.
        say: prints lines for the user; None is the terminal's stderr, on the first process.
    """

    def __init__(
        self,
        config: TrainConfig,
        make_backend: Callable[[TrainConfig], Backend],
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.config = config
        self.make_backend = make_backend
        self._print = say or terminal.say
        # torchrun gives the rank before the backend does.
        self.speaks = os.environ.get("RANK", "0") == "0"
        self.folder = Path(config.output_dir) / (config.run_name or config.task.name)
        self.dtype = getattr(torch, config.torch_dtype)
        self.metrics: MetricsHook | None = None
        self.evaluations: EvaluationHook | None = None
        self.exporter: Exporter | None = None
        self.export_place: ExportPlace | None = None
        self.complete = False
        self.saver: Saver | None = None
        self.point: ResumePoint | None = None
        self.past = Past()
        self._locked = False

    # -- the whole ---------------------------------------------------------------------------------

    def run(self) -> StepNumbers | None:
        """Prepare, train and finish; return None after a dry run."""
        with ExitStack() as self.held:
            return self._run()

    def _run(self) -> StepNumbers | None:
        self.prepare()
        if self.config.dry_run:
            self.say("dry_run=true: everything above is ready; stopping before the first step.")
            return None
        if self.complete:
            if self.export_place is not None:
                self.export_place.discard()
                Exporter.require_certified(self.export_place)
            self.say(f"{self.folder} holds this run, complete; there is nothing left to do.")
            return self._numbers_before()
        self.start()
        try:
            numbers = self.train()
        except DivergedError as error:
            raise DivergedError(f"{error} {self._keep_weights()}") from error
        self.finish(numbers)
        if self.saver is not None:
            self.saver.require()
        return numbers

    def _is_complete(self) -> bool:
        """Return True if every step is done and the export that the config asks for exists."""
        if self.point is None or not self.point.own:
            return False
        if self.point.step < self.plan.total_steps and not self.stopped_early():
            return False
        return self.export_place is None or self.export_place.is_there()

    def stopped_early(self) -> bool:
        """Return True if the run that is resumed had stopped early after its last step."""
        return self.past.stopped_early(self.choosing.stopping)

    def say(self, line: str) -> None:
        """Print a line for the user, on the first process only."""
        if self.speaks:
            self._print(line)

    # -- before ------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Read and check everything except the weights."""
        c = self.config
        place = resuming.checkpoints_place(self.folder, c.checkpoint.folder)
        self.choosing = make_choosing(c.eval, c.selection)
        graders = make_graders(c.eval)
        self.catalog = Catalog(open_storage(place), self.choosing.rule.rank)
        if not c.dry_run:
            resuming.may_go_on(c.resume.source, self.folder, self.catalog)
        self.files = files_of(c, weights=not c.dry_run)
        self.tensor_of = None if c.dry_run else self.weights()
        longest = self.files.architecture.max_position_embeddings
        if c.dataset.block_size > longest:
            self.say(
                f"note: dataset.block_size={c.dataset.block_size} is beyond the model's "
                f"max_position_embeddings={longest}; positions past it were never trained."
            )
        c = self._choose_template()
        self.rows = prepare_run_data(c, self.files.tokenizer, self.template, self.say)
        self.data = self.rows.train
        self.stop_ids = tuple(sorted({self.files.tokenizer.eos_id, *self.data.stop_ids()}))
        self.evaluation = make_evaluation(
            c.eval,
            self.choosing,
            graders,
            rows=self.rows.sources,
            rejected=self.rows.rejected_heldout(),
            tokenizer=self.files.tokenizer,
            template=self.template,
            stop_ids=self.stop_ids,
            max_length=longest,
            seed=c.seed,
            folder=self.folder,
        )
        self.backend = self.make_backend(c)
        self.speaks = self.backend.processes.index == 0
        self.optimizer = optimizer_of(c)
        self.order = DataOrder(self.data, c.seed, c.task.global_batch_size)
        self.table, self.plan = plan_run(c, self.files, self.rows, self.optimizer)
        self.backend.check(self.files.build(), self.table)
        if not c.dry_run:
            self._find_point()
        self.check_output()
        self.say(self.plan.describe())
        peak, total = c.task.optimizer.learning_rate, self.plan.total_steps
        if note := schedule_note(self._schedule(), peak=peak, total_steps=total):
            self.say(f"note: {note}")
        for line in self.files.vocabulary.describe() if self.files.vocabulary else ():
            self.say(f"  {line}")
        self.say(f"  attention    {self.backend.attention} ({self.backend.attention_why})")
        self.say(f"  loss         {self.backend.loss} ({self.backend.loss_why})")

    def _choose_template(self) -> TrainConfig:
        """Find the chat template. A date that it writes becomes part of the config, so that a
        resumed run has the same one."""
        c = self.config
        date = resuming.recorded_date(c.resume.source, self.catalog)
        self.template = template_of(c.dataset, self.files.tokenizer, date)
        if self.template is not None and self.template.date:
            dataset = replace(c.dataset, template_date=self.template.date)
            self.config = replace(c, dataset=dataset)
        return self.config

    def weights(self) -> Callable[[str], Tensor]:
        """Return the source of initial values: the checkpoint if one is named, else random."""
        if self.files.folder is None:
            return random_tensors(self.files, self.config.seed)
        return pretrained_tensors(self.files, self.dtype)

    def check_output(self) -> None:
        """Check now that the outputs at the end of the run can be written."""
        c = self.config
        self.exporter = Exporter(
            self.files,
            layout=WeightLayout(self.files.shapes, self.dtype, int(c.task.max_shard_size_gb * 1e9)),
            card=CardFacts(
                name=c.run_name,
                base_model=c.model.pretrained_model,
                dataset=self.rows.report.source,
                hub_model=hub_name(c.model.pretrained_model),
                hub_datasets=tuple(self.rows.sources.hub_names()),
                command=run_folder.command(),
                parameters=self.files.num_parameters,
                versions=run_folder.versions(),
            ),
            # Only a template used in training replaces the tokenizer's own one.
            template=self.template if self.rows.report.has_chats else None,
            stop_ids=self.stop_ids,
            fingerprints={
                **self.rows.fingerprints(),
                "config": run_folder.config_fingerprint(c.to_dict()),
            },
            say=self.say,
        )
        if not c.task.convert_to_safetensors and self.backend.processes.count > 1:
            raise ConfigError(
                "task.convert_to_safetensors=false writes from one host only for now; there are "
                f"{self.backend.processes.count}. Set it to true."
            )
        if (wanted := c.task.export_checkpoint_path) is not None:
            # A relative path is inside the run's folder; an absolute one or one with `..` is used
            # as it is.
            place = wanted if is_url(wanted) else self.folder / wanted
            self.export_place = ExportPlace.of(place, self.folder / run_folder.TO_SEND)
        self.complete = self.backend.processes.first_does(self._is_complete)
        self.backend.processes.first_does(self._try_places)
        if c.saves and not c.dry_run:
            resuming.check_shared(self.backend.processes, self.catalog.storage)

    def _try_places(self) -> None:
        """Check now that checkpoints and the export can be written. Only the first process does: it
        alone writes an export, and hosts may have disks of their own."""
        c, exporter, place = self.config, self.exporter, self.export_place
        assert exporter is not None
        needs = [Need("records", self.folder, 1_000_000, len(run_folder.OWN_NAMES), "output_dir")]
        if c.saves:
            if not c.dry_run:
                resuming.check_writable(self.catalog.storage)
            if isinstance(self.catalog.storage, LocalStorage):
                needs.append(self._checkpoint_need(self.catalog.storage.root))
        if place is not None and not self.complete:
            if isinstance(place, LocalPlace):
                run_folder.check_export_folder(self.folder, place.local)
            exporter.check(place)
            if not c.dry_run:
                place.probe()
            needs.append(exporter.need(place))
        require_room(needs)

    def _checkpoint_need(self, root: Path) -> Need:
        """Return the disk space that one checkpoint needs, beside the existing ones."""
        c, shapes = self.config, self.files.shapes
        size = checkpoint_bytes(c, shapes, self.optimizer)
        if c.checkpoint.hf:
            size += self.files.num_parameters * self.dtype.itemsize
        return Need("a checkpoint", root, size, 40, "checkpoint.folder")

    def _find_point(self) -> None:
        """Find the checkpoint to start from; all differences from it are reported, or refused."""
        c = self.config
        self.backend.processes.first_does(self._lock_existing)
        self.point = resuming.agree_on_point(
            self.backend.processes, c.resume.source, self.catalog, self.say
        )
        if self.point is None:
            return
        older = {"model": self.files.older_fingerprint()}
        changes = find_changes(self.point.reader.manifest, c.to_dict(), self.identity(), older)
        refuse_changes(changes, c.resume.allow_changes, self.point.where)
        self.say(f"going on from {self.point.where}")
        for change in changes:
            self.say(f"  {change.describe()}")
        own, manifest = self.point.own, self.point.reader.manifest
        self.past = Past.of(manifest) if own else Past(manifest.step)

    def _lock_existing(self) -> None:
        if self.folder.is_dir():
            self._lock()

    def _lock(self) -> None:
        """Keep other processes out of the run's folder, once."""
        if not self._locked:
            self.held.enter_context(run_lock(self.folder))
            self._locked = True

    def identity(self) -> dict[str, str | None]:
        """Return the fingerprints of the inputs of a run's steps."""
        return {"model": self.files.fingerprint(), **self.rows.fingerprints()}

    # -- the run -----------------------------------------------------------------------------------

    def start(self) -> None:
        """Place the weights, then create the run's folder: an error in between leaves no folder."""
        c, point = self.config, self.point
        assert self.tensor_of is not None
        self.model = self.files.build()
        tensor_of = self.tensor_of if point is None else point.weight
        self.backend.place(self.model, self.table, tensor_of, self.dtype)
        self.tensor_of = None  # closes the checkpoint's mapped files
        self.backend.prepare_training(
            self.optimizer,
            step_options(c, len(self.data.source_names)),
            None if point is None else point.state(),
        )
        if c.isolation_probe:
            rows = c.task.global_batch_size // c.task.gradient_accumulation_steps
            vocab = self.files.architecture.vocab_size
            self.say(f"  {probe_isolation(self.backend, self.data, rows, vocab)}")
        if point is not None:
            states = point.reader.manifest.rng
            resuming.restore_rng(states)
            if point.reader.manifest.backend == self.backend.name:
                resuming.restore_device(self.backend, states)
        else:
            resuming.seed_rng(c.seed)
            self.backend.seed(c.seed)
        self.backend.processes.first_does(self._make_folder)

    def _make_folder(self) -> None:
        with run_folder.writing(self.folder):
            self._open_folder()

    def _open_folder(self) -> None:
        """Create the run's folder, or continue it."""
        goes_on = self.point is not None and self.point.own
        if goes_on:
            resuming.cut_metrics(self.folder / resuming.METRICS, self.first_step)
            resuming.cut_evaluations(self.folder / EVALUATIONS, self.first_step)
            self.catalog.set_aside_after(self.first_step, self.say)
        elif resuming.died_early(self.folder):
            resuming.set_aside(self.folder, self.say)
        else:
            run_folder.claim(self.folder)
            self._lock()
        self.catalog.clean()
        clear_temporary(self.folder)
        run_folder.write_config(self.folder, self.config.to_dict())
        write_json(self.folder / "data_report.json", self.rows.reports())
        facts = run_facts(self.config, self.backend, self.files, self.rows, self.plan)
        run_folder.write_facts(self.folder, facts, self.first_step)

    @property
    def first_step(self) -> int:
        """The number of updates that were done before this start."""
        return 0 if self.point is None else self.point.step

    def train(self) -> StepNumbers:
        """Run the loop with its hooks."""
        c = self.config
        guard = CompileGuard(self.backend, allow=c.allow_recompile)
        control = RunControl(guard, Stopwatch())
        self.metrics = MetricsHook(self._writers())
        hooks: list[Hook] = [self.metrics]
        if self.rows.heldout is not None:
            batch_size = c.task.global_batch_size // c.task.gradient_accumulation_steps
            self.evaluations = EvaluationHook(
                self.backend,
                HeldOut(self.rows.heldout, batch_size, c.eval.every_steps),
                self.evaluation,
                control,
                self.past,
                emit=self.metrics.emit,
                say=self.say,
            )
            hooks.append(self.evaluations)
        if c.profile_start_step is not None and c.profile_end_step is not None:
            folder = c.profile_dir or str(own_folder(self.folder, "profile", "output_dir"))
            start, end = c.profile_start_step, c.profile_end_step
            hooks.append(ProfileHook(self.backend, start=start, end=end, folder=folder))
        if c.saves:
            hooks.append(self._checkpoints())
        loop = TrainLoop(
            self.backend,
            self.order,
            accumulation=c.task.gradient_accumulation_steps,
            learning_rate=self._schedule(),
            logging_steps=c.logging_steps,
            flops_per_token=flops_per_token(
                self.files.architecture, self.files.num_parameters, c.dataset.block_size
            ),
            hooks=hooks,
            control=control,
        )
        last = self.first_step if self.stopped_early() else self.plan.total_steps
        numbers = loop.run(range(self.first_step, last))
        return self._numbers_before() or numbers if self.first_step >= last else numbers

    def _schedule(self) -> Callable[[int], float]:
        """Return the learning rate of each 0-based step."""
        o, s = self.config.task.optimizer, self.config.task.lr_scheduler
        return partial(
            learning_rate,
            peak=o.learning_rate,
            total_steps=self.plan.total_steps,
            schedule=s.name,
            warmup_steps=self.plan.warmup_steps,
            min_lr_ratio=s.min_lr_ratio,
        )

    def _numbers_before(self) -> StepNumbers | None:
        return resuming.last_numbers(self.folder / resuming.METRICS, self.first_step)

    def _checkpoints(self) -> CheckpointHook:
        """Return the hook that writes checkpoints, after all other hooks of the same step."""
        c, metrics, evaluations = self.config.checkpoint, self.metrics, self.evaluations
        assert metrics is not None
        self.saver = self._make_saver(before_commit=metrics.sync)
        return CheckpointHook(
            self.backend,
            self.saver,
            every_steps=c.every_steps,
            every_minutes=c.every_minutes,
            logging_steps=self.config.logging_steps,
            folder=self.folder,
            scores=(lambda step: {}) if evaluations is None else evaluations.scores_after,
            save_best=self.config.export.which == "best",
            emit=metrics.emit,
        )

    def _make_saver(self, before_commit: Callable[[], None]) -> Saver:
        c = self.config.checkpoint
        return Saver(
            self.backend,
            self.catalog,
            manifest=self.manifest,
            more=self._keep_for_export,
            before_commit=before_commit,
            retention=Retention(c.keep_last, c.keep_best, c.keep_every),
            asynchronous=c.asynchronous,
            best=self._best_checkpoint(),
            say=self.say,
        )

    def _best_checkpoint(self) -> dict[str, Any] | None:
        """Return the best existing checkpoint of this run, by the present rule; the first process
        finds it and updates the pointer too."""
        if self.point is None or not self.point.own:
            return None
        return self.backend.processes.first_does(self.catalog.point_to_best)

    def _keep_for_export(self, writer: FolderWriter, manifest: Manifest) -> None:
        """Write the files that an export of the checkpoint needs besides tensors (hf/)."""
        assert self.exporter is not None
        weights = self.config.checkpoint.hf
        self.exporter.keep(writer, step=manifest.step, metrics=manifest.metrics, weights=weights)

    def manifest(self, step: int) -> Manifest:
        """Return the manifest: all that a resume after this step needs except the tensors."""
        return make_manifest(
            self.config,
            step,
            self.backend,
            self.files,
            self.identity(),
            self.optimizer,
            self.plan,
            num_blocks=self.data.num_blocks,
            metrics=self._metrics_so_far(step),
            hooks={} if self.evaluations is None else self.evaluations.remembered(),
        )

    def _writers(self) -> list[Writer]:
        if self.backend.processes.index != 0:
            return []
        return [
            JsonlWriter(self.folder / resuming.METRICS),
            TensorBoardWriter(self.folder, self.first_step),
            ConsoleWriter(self.plan.total_steps, self.first_step),
        ]

    # -- after -------------------------------------------------------------------------------------

    def finish(self, numbers: StepNumbers) -> None:
        """Finish after the last step: export, if the config names a place, print changes, write the
        report."""
        try:
            self._finish(numbers)
        finally:  # also of an export that failed its checks
            self.report()

    def _finish(self, numbers: StepNumbers) -> None:
        step = self.backend.progress()[0]
        if self.export_place is not None:
            FinalExport(
                self.backend.processes,
                self.export_place,
                export=partial(self._export, self.export_place, step, numbers.loss),
                saved=partial(self.backend.processes.first_does, partial(self._saved, step)),
                save=partial(self._save, step),
                say=self.say,
            ).run()
            self.show_export(self.export_place.local)
            self.export_place.discard()
        if self.evaluations is not None:
            history = self.evaluations.history
            best = self.choosing.rule.best(history)
            if self.config.export.which == "best" and self.saver is not None:
                best = self.saver.best["step"] if self.saver.best else None
            for line in table_lines(history, best):
                self.say(f"  {line}")

    def report(self) -> None:
        """Write report.md and report.html; an error is only printed."""
        if self.backend.processes.index != 0:
            return
        try:
            paths = write_report(self.folder)
        except Exception as error:  # the run is finished, and worth more than its report
            self.say(f"no report: {type(error).__name__}: {error}")
        else:
            self.say(f"report: {' and '.join(map(str, paths))}")

    def show_export(self, out: Path) -> None:
        """Show the result of an export to the user."""

    def _export(
        self, place: ExportPlace, step: int, loss: float, others_wait: Callable[[], None]
    ) -> None:
        """Export the best step's weights from its checkpoint, or the last one's from the device."""
        assert self.exporter is not None
        metrics: dict[str, Any] = self._metrics_at(step, loss, step)
        if self.config.export.which == "best":
            assert self.saver is not None and self.evaluations is not None
            best = self.saver.best
            if best is not None and best["step"] != step:
                if self.backend.processes.index == 0:
                    others_wait()
                    self._export_checkpoint(place, best["step"])
                return
            if best is None:
                failed = self.choosing.rule.failed(self.evaluations.history[-1].scores)
                why = ", ".join(map(str, failed)) or "no value was finite"
                metrics["selection"] = f"no step qualifies (the last one: not {why}); the last step"
                self.say(f"export.which=best: {metrics['selection']} is exported instead")
        if self.config.task.convert_to_safetensors:
            self.exporter.write(place, self.backend, metrics, step=step, others_wait=others_wait)
        else:
            self.exporter.write_sharded(place, self.backend)

    def _saved(self, step: int) -> str | None:
        """Return the checkpoint of the weights to be exported, if there is one."""
        if self.config.export.which == "best" and self.saver is not None and self.saver.best:
            step = self.saver.best["step"]
        there = step in self.catalog.steps()
        return self.catalog.storage.describe(self.catalog.name_of(step)) if there else None

    def _save(self, step: int) -> str:
        """Write a checkpoint now, even if the run was configured to write none."""
        saver = self._make_saver(before_commit=lambda: None)  # writers are closed by now
        saver.save(step, scores={}, wait=True)
        saver.require()
        return self.catalog.storage.describe(self.catalog.name_of(step))

    def _export_checkpoint(self, place: ExportPlace, step: int) -> None:
        name = self.catalog.name_of(step)
        self.say(f"the best step is {step}: exporting {self.catalog.storage.describe(name)}")
        self.catalog.check(name)
        export_checkpoint(self.catalog.storage, name, place, base=self.files.folder, say=self.say)

    def _metrics_so_far(self, step: int) -> dict[str, float]:
        """Return the last metrics, for a checkpoint."""
        assert self.metrics is not None
        record = self.metrics.last
        # None right after a resume.
        return {} if record is None else self._metrics_at(step, record.loss, record.step)

    def _metrics_at(self, step: int, loss: float, loss_step: int) -> dict[str, Any]:
        history = self.evaluations.history if self.evaluations is not None else []
        return metrics_at(step, loss, loss_step, history)

    def _keep_weights(self) -> str:
        """Save the weights from before a divergence, which the device still holds.

        Their bytes are checked, not their logits: they may compute no finite ones. If they can't be
        saved (NaN in the checkpoint itself, a full disk), that error must not hide the divergence.
        """
        assert self.exporter is not None
        folder = self.folder / "checkpoints" / "before_divergence"
        try:
            self.exporter.write(folder, self.backend, {}, step=None, prove_logits=False)
        except (UserError, OSError) as error:
            return f"The weights before it could not be kept: {error}"
        return f"The weights before it are kept in {folder}."
