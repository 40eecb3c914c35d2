"""The trackers of a run: opened after its folder, finished after its report."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from torchprime.checkpoint.proof.certificate import CERTIFICATE
from torchprime.errors import StoppedError
from torchprime.evaluation.behaviour import read_samples, samples_file
from torchprime.evaluation.graders.samples import Sample
from torchprime.metrics.trackers.choose import open_trackers
from torchprime.metrics.trackers.sender import Sender, finish
from torchprime.metrics.trackers.tracker import Outcome, Table, TrackedRun
from torchprime.report.write import MARKDOWN, PAGE
from torchprime.training.prepare import Prepared
from torchprime.training.run import folder as run_folder

MOST_ROWS = 200  # of a table of answers; the run's folder has all of them
STOPS = (StoppedError, KeyboardInterrupt)


@dataclass(frozen=True)
class Tracking:
    """The trackers of a run, as a `with` block: at its end they get the outcome and the report.

    Attributes:
        senders: one for each tracker; none on processes other than the first.
        export: the folder of the export, if it is on this machine.
        seconds: the longest wait at the end.
    """

    senders: list[Sender]
    folder: Path
    export: Path | None
    seconds: float

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        outcome: Outcome = "finished" if error is None else "failed"
        if isinstance(error, STOPS):
            outcome = "stopped"
        finish(self.senders, outcome, self._files(), self.seconds)

    def _files(self) -> list[Path]:
        found = [self.folder / name for name in (MARKDOWN, PAGE, run_folder.FACTS)]
        if self.export is not None:
            found.append(self.export / CERTIFICATE)
        return [path for path in found if path.is_file()]


def start_tracking(prepared: Prepared) -> Tracking:
    """Open the config's trackers, on the first process only."""
    p, metrics, place = prepared, prepared.config.metrics, prepared.export_place
    run = TrackedRun(
        name=p.folder.absolute().name,
        folder=p.folder,
        config=p.config.to_dict(),
        project=metrics.project,
        first_step=p.past.step,
        offline=metrics.offline,
        finish_seconds=metrics.finish_seconds,
    )
    first = p.backend.processes.index == 0
    senders = (
        open_trackers(metrics.trackers, run, p.say, partial(answers_table, p.folder))
        if first
        else []
    )
    export = None if place is None else place.local
    return Tracking(senders, p.folder, export, metrics.finish_seconds)


def answers_table(folder: Path, step: int) -> Table:
    """Return the graded answers of a step, from the run's folder."""
    found = read_samples(samples_file(folder, step))[:MOST_ROWS]
    names = [field.name for field in fields(Sample)]
    graders = list(found[0][1]) if found else []
    return Table(
        [*names, *graders],
        [
            [*(getattr(sample, name) for name in names), *(grades[each] for each in graders)]
            for sample, grades in found
        ],
    )
