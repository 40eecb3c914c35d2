"""One run of a sweep, from its composed config to the value by which it is judged.

Hydra's launchers call a `SweepTask` here or in other processes. A run that fails does not raise:
the sweep goes on, and the run's row has the message.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from torchprime.checkpoint.run.lock import run_lock
from torchprime.config.compose import register_folders
from torchprime.config.many_runs.jobs import Multirun, job_of
from torchprime.config.many_runs.processes import Ended
from torchprime.errors import INTERRUPTED, UserError
from torchprime.files.atomic import make_folder, remove_folder
from torchprime.report.read import RunReport, read_report
from torchprime.report.write import MARKDOWN as REPORT
from torchprime.sweep.jobs import (
    SweepJob,
    job_lock,
    job_path,
    read_job,
    refuse_other_run,
    sweep_job,
    write_job,
)
from torchprime.sweep.process import RunProcesses
from torchprime.text.terminal import say


def make_run(job: SweepJob, folder: Path, processes: RunProcesses) -> Ended:
    """Make a run, unless it is finished; one that was stopped resumes from its checkpoint.

    Args:
        folder: of the sweep.
    """
    with job_lock(folder, job.name):
        return _make_run(job, folder, processes)


def _make_run(job: SweepJob, folder: Path, processes: RunProcesses) -> Ended:
    before = read_job(folder, job.name)
    run = folder / job.name
    if before is not None and (before.finished and run.is_dir() or _is_complete(run)):
        say(f"{job.name}: finished before")
        write_job(folder, job, 0)
        return Ended(0, False)
    if before is not None:
        _clear(run, job)
    write_job(folder, job)
    ended = processes.run(job, job_path(folder, job.name, ".log"))
    write_job(folder, job, ended.code, ended.message)
    return ended


def _is_complete(run: Path) -> bool:
    """Return True if a run ended after the sweep's process had died: it has written its report."""
    if not (run / REPORT).is_file():
        return False
    try:
        report = read_report(run)
    except UserError:
        return False
    return report.finished and (report.export is None or report.export.there)


def _clear(run: Path, job: SweepJob) -> None:
    """Remove what a run left that has no checkpoint to resume from; it begins again."""
    if not run.is_dir():
        return
    elsewhere = job.config.checkpoint.folder is not None
    if job.config.saves and (elsewhere or any((run / "checkpoints").glob("step_*"))):
        return
    with run_lock(run):
        say(f"{job.name}: it was stopped and has no checkpoint (checkpoint.every_steps=N writes "
            "them), so it begins again")  # fmt: skip
        remove_folder(run)


def objective(report: RunReport) -> float | None:
    """Return the value of the first ranked metric at the run's best step; None if no step
    qualifies."""
    return None if report.best is None else report.best_scores[report.rule.ranking[0].metric]


@dataclass
class SweepTask:
    """The function that Hydra calls for each run; other processes may get a copy of it.

    Attributes:
        program: the command line that starts a run, up to the run's own arguments.
        folder: of the sweep.
    """

    many: Multirun
    program: Sequence[str]
    folder: Path

    def __call__(self, composed: DictConfig) -> float | None:
        """Make a run; return its objective, or None if it failed or no step of it qualifies.

        Raises:
            SystemExit: this process was asked to stop.
        """
        register_folders()
        name = ",".join(HydraConfig.get().overrides.task)
        try:
            job = sweep_job(job_of(composed, self.many.command, name), self.many, self.folder)
            refuse_other_run(self.folder, job)
            make_folder(self.folder)
            ended = self._run(job)
            if ended.stopped:
                raise SystemExit(ended.code or INTERRUPTED)
            return None if ended.code else objective(read_report(self.folder / job.name))
        except UserError as error:
            say(f"error: {name}: {error}")
            return None

    def _run(self, job: SweepJob) -> Ended:
        processes = RunProcesses(self.program)
        try:
            return make_run(job, self.folder, processes)
        finally:
            processes.close()
