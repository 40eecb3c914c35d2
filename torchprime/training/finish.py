"""The end of a run: export, the values before and after, the report; weights are never lost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from torchprime.checkpoint.places import ExportPlace
from torchprime.errors import UserError
from torchprime.evaluation.before_after import table_lines
from torchprime.metrics.goodput import read_account
from torchprime.report.run_facts import describe_compiled
from torchprime.report.write import write_report
from torchprime.training.prepare import Prepared
from torchprime.training.run import folder as run_folder
from torchprime.training.run.final_export import FinalExport
from torchprime.training.start import Run, make_saver


def export_at_end(run: Run, place: ExportPlace, loss: float) -> None:
    """Export the run's weights. If that fails, a checkpoint keeps them.

    Args:
        loss: of the last step.
    """
    p = run.prepared
    step = p.backend.progress()[0]
    FinalExport(
        p.backend.processes,
        place,
        export=partial(_export, run, place, step, loss),
        saved=partial(p.backend.processes.first_does, partial(_saved, run, step)),
        save=partial(_save, run, step),
        say=p.say,
    ).run()


def _export(
    run: Run, place: ExportPlace, step: int, loss: float, others_wait: Callable[[], None]
) -> None:
    """Export the best step's weights from its checkpoint, or the last one's from the device."""
    p, config = run.prepared, run.prepared.config
    metrics: dict[str, float | str] = {**run.snapshots.metrics_at(step, loss, step)}
    chosen = step
    if config.export.which == "best":
        best = best_step(run)
        if best is not None:
            chosen = best
        else:
            failed = p.choosing.rule.failed_at_end(run.snapshots.history)
            why = failed or "no value was finite"
            metrics["selection"] = f"no step qualifies (the last one: not {why}); the last step"
            p.say(f"export.which=best: {metrics['selection']} is exported instead")
    if chosen != step or config.task.ema_decay is not None:
        if chosen == step and p.backend.processes.first_does(partial(_saved, run, step)) is None:
            _save(run, step)
        if p.backend.processes.index == 0:
            others_wait()
            _export_checkpoint(p, place, chosen)
        return
    if config.task.convert_to_safetensors:
        p.exporter.write(place, p.backend, metrics, step=step, others_wait=others_wait)
    else:
        p.exporter.write_sharded(place, p.backend)


def best_step(run: Run) -> int | None:
    """Return the step of the best checkpoint, if there is one."""
    best = None if run.saver is None else run.saver.best
    return None if best is None else best["step"]


def _export_checkpoint(prepared: Prepared, place: ExportPlace, step: int) -> None:
    p, storage = prepared, prepared.catalog.storage
    name = p.catalog.name_of(step)
    which = "best" if p.config.export.which == "best" else "last"
    p.say(f"the {which} step is {step}: exporting {storage.describe(name)}")
    p.catalog.check(name)
    p.exporter.write_checkpoint(place, storage, name, p.inputs.files.folder)


def _saved(run: Run, step: int) -> str | None:
    """Return the checkpoint of the weights to be exported, if there is one."""
    catalog = run.prepared.catalog
    if run.prepared.config.export.which == "best" and (best := best_step(run)) is not None:
        step = best
    there = step in catalog.steps()
    return catalog.storage.describe(catalog.name_of(step)) if there else None


def _save(run: Run, step: int) -> str:
    """Write a checkpoint now, even if the run was configured to write none."""
    saver, catalog = make_saver(run.prepared), run.prepared.catalog
    saver.save(run.snapshots.take_late(step), wait=True)
    saver.require()
    return catalog.storage.describe(catalog.name_of(step))


def say_changes(run: Run) -> None:
    """Print the values before and after the run, and those of the best step."""
    p, history = run.prepared, run.snapshots.history
    if not history:
        return
    best = p.choosing.rule.best(history)
    if p.config.export.which == "best" and run.saver is not None:
        best = best_step(run)
    for line in table_lines(history, best):
        p.say(f"  {line}")
    for told, passed, failing in p.choosing.rule.gate_rows(history):
        p.say(f"  gate {told}: {passed} steps pass" + (f", not {failing}" if failing else ""))


def account_run(run: Run) -> None:
    """Write the uses of the wall clock to times.jsonl and run.json, and print its goodput; an error
    is only printed."""
    folder = run.prepared.folder
    try:
        run.times.write_last()
        goodput = read_account(folder)
        assert goodput is not None
        compiled = {kind: asdict(c) for kind, c in run.loop.control.guard.compiled.items()}
        run_folder.add_facts(folder, {"goodput": goodput.to_dict(), "compiled": compiled})
    except (UserError, OSError) as error:  # it must not hide that of a failed export
        run.prepared.say(f"no account of the run's time: {error}")
    else:
        run.prepared.say(goodput.describe())
        if compiled:
            run.prepared.say(f"compiled {describe_compiled(compiled)}")


def report_run(folder: Path, say: Callable[[str], None]) -> None:
    """Write report.md and report.html; an error is only printed."""
    try:
        paths = write_report(folder)
    except Exception as error:  # the run is finished, and worth more than its report
        say(f"no report: {type(error).__name__}: {error}")
    else:
        say(f"report: {' and '.join(map(str, paths))}")


def keep_weights(prepared: Prepared) -> str:
    """Save the weights from before a divergence, which the device still holds.

    Their bytes are checked, not their logits: they may compute no finite ones. If they can't be
    saved (NaN in the checkpoint itself, a full disk), that error must not hide the divergence.
    """
    folder = prepared.folder / "checkpoints" / "before_divergence"
    try:
        prepared.exporter.write(folder, prepared.backend, {}, step=None, prove_logits=False)
    except (UserError, OSError) as error:
        return f"The weights before it could not be kept: {error}"
    return f"The weights before it are kept in {folder}."
