"""A sweep: its runs are made, then its table. The same command goes on after a kill."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from torchprime.checkpoint.run.lock import run_lock
from torchprime.config.checks import refuse
from torchprime.config.compose import quiet_settings
from torchprime.config.hydra_plugins import BASIC, OPTUNA, SWEEPER
from torchprime.config.many_runs.jobs import Multirun, compose_jobs, launch_jobs
from torchprime.config.many_runs.processes import refuse_shared_folders, run_jobs
from torchprime.evaluation.selection import Rule, parse_rule
from torchprime.files.atomic import make_folder
from torchprime.files.private_folders import require_private
from torchprime.sweep.jobs import (
    JOBS,
    SweepJob,
    job_path,
    read_job,
    read_jobs,
    refuse_other_run,
    sweep_folder,
    sweep_job,
    write_job,
)
from torchprime.sweep.process import RunProcesses
from torchprime.sweep.task import SweepTask, make_run
from torchprime.sweep.write import summary_lines, write_sweep
from torchprime.text.terminal import print_lines, say

DIRECTION = "hydra.sweeper.direction"
SAMPLER_SEED = "hydra.sweeper.sampler.seed"


def make_sweep(many: Multirun, program: Sequence[str]) -> int:
    """Make the runs of a command with -m and the sweep's table; return the first nonzero exit code.

    Every run is checked before the first one starts, except where a sweeper chooses values by
    earlier results.

    Args:
        program: the command line that starts a run, up to the run's own arguments.

    Raises:
        ConfigError: a wrong value, or a folder with other runs.
        RuntimeSetupError: another process works in the sweep's folder.
    """
    if many.config.dry_run or many.config.compile_only is not None:  # they leave no run
        many.require_basic()
        return run_jobs(compose_jobs(many.command), program)
    selection = many.config.selection
    rule = parse_rule(selection.gates, selection.ranking, many.config.measured)
    folder = sweep_folder(many)
    jobs = _jobs(many, folder) if many.sweeper == BASIC else []
    settings = _settings(many, rule, folder)
    with _held(folder):
        for job in jobs:
            if read_job(folder, job.name) is None:
                write_job(folder, job)
        try:
            if many.sweeper == many.launcher == BASIC:
                _one_after_another(jobs, program, folder)
            else:
                _launch(many, SweepTask(many, list(program), folder), settings)
        finally:
            found = write_sweep([folder], folder)
        print_lines(summary_lines(found, folder))
        return next((job.code for job in read_jobs(folder) if job.code), 0)


def _jobs(many: Multirun, folder: Path) -> list[SweepJob]:
    """Return all runs of a sweep, checked.

    Raises:
        ConfigError: one has a wrong value, two have the same folder, or an earlier run with other
            values has it.
    """
    jobs = [sweep_job(job, many, folder) for job in compose_jobs(many.command)]
    advice = "Give each value once, and leave run_name out: the values then name each run."
    refuse_shared_folders([job.config for job in jobs], advice)
    for job in jobs:
        refuse_other_run(folder, job)
    return jobs


def _settings(many: Multirun, rule: Rule, folder: Path) -> list[str]:
    """Return overrides of Hydra's own: its folder, and for Optuna the direction of the rule's first
    metric and the seed, so that the same command chooses the same values again.

    Raises:
        ConfigError: Optuna has nothing to optimize, or another direction.
    """
    hydra = folder.absolute() / JOBS / "hydra"
    settings = [*quiet_settings(hydra), "hydra.sweep.subdir=${hydra.job.num}"]
    if many.sweeper != OPTUNA:
        return settings
    if not many.config.holds_out:
        refuse(
            SWEEPER,
            many.sweeper,
            "a config with held-out rows, whose metric it optimizes",
            "Add eval=file eval.file_dataset_path=FILE, or dataset.eval_fraction=0.1.",
        )
    order = rule.ranking[0]
    direction = "maximize" if order.descending else "minimize"
    given = str(many.hydra.sweeper.direction).rpartition(".")[2]
    if any(each.startswith(f"{DIRECTION}=") for each in many.command.overrides):
        if given != direction:
            refuse(
                DIRECTION,
                given,
                f"{direction}, since the runs are ranked by {order}",
                "Leave it out, or change selection.ranking.",
            )
    else:
        settings.append(f"{DIRECTION}={direction}")
    sampler = many.hydra.sweeper.sampler
    if "seed" in sampler and sampler.seed is None:
        settings.append(f"{SAMPLER_SEED}={many.config.seed}")
    return settings


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Make the sweep's folder and keep other sweeps out of it."""
    require_private(folder, "output_dir")
    make_folder(folder)
    with run_lock(folder):
        yield


def _one_after_another(jobs: Sequence[SweepJob], program: Sequence[str], folder: Path) -> None:
    """Make all runs; a signal ends the present one, and no other is started."""
    processes = RunProcesses(program)
    try:
        for number, job in enumerate(jobs, start=1):
            if number > 1:
                write_sweep([folder], folder)
            say(f"run {number} of {len(jobs)}: {job.name}")
            ended = make_run(job, folder, processes)
            if ended.code:
                log = job_path(folder, job.name, ".log")
                say(f"{job.name}: exit code {ended.code}: {ended.message} ({log})")
            if ended.stopped:
                return
    finally:
        processes.close()


def _launch(many: Multirun, task: SweepTask, settings: Sequence[str]) -> None:
    """Make the runs where and when the sweeper and the launcher say."""
    try:
        launch_jobs(many.command, task, settings)
    except ValueError as error:  # optuna's, if no trial has a value
        if many.sweeper != OPTUNA:
            raise
        say(f"{SWEEPER}: no run has a value to compare ({error})")
