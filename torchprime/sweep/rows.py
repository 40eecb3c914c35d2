"""The table of a sweep: a row for each run, ranked by the runs' own selection rule.

    folders of runs, jobs of sweeps  ->  RunReport of each (report/read.py)  ->  Row  ->  Table

Any runs can be read, also those that no sweep made: what differs is then found in their configs.
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from torchprime.config.checks import shown
from torchprime.config.load import flat_keys
from torchprime.errors import INTERRUPTED, DataError, StoppedError, UserError
from torchprime.evaluation.selection import Rank, Rule
from torchprime.report.read import RunReport, read_report
from torchprime.sweep.jobs import INCIDENTAL, JobFile, read_jobs, short_names

State = Literal["finished", "unfinished", "failed", "not started"]
STOPPED = (None, 0, StoppedError.exit_code, INTERRUPTED, 128 + signal.SIGTERM)  # did not fail
RUN_FILES = ("config.yaml", "run.json")


@dataclass(frozen=True)
class Measured:
    """A held-out metric at a run's best step; the 95% interval and the count are of graded
    answers."""

    value: float
    low: float | None = None
    high: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Row:
    """A run of a sweep. What an unfinished run does not have is None.

    Attributes:
        rank: 1 for the best run; None if it is not finished or no step of it qualifies.
        message: why it failed or cannot be read.
        varied: what differs between the runs, by key.
        parameterization: all weights, or the kind of adapter.
        data, held_out: fingerprints of the packed rows.
        best_step: the step that the run's rule puts first, which `metrics` are of.
        seconds: of wall clock, over all starts.
    """

    run: str
    folder: str
    state: State
    rank: int | None
    message: str
    varied: dict[str, str]
    parameterization: str | None = None
    trained_parameters: int | None = None
    parameters: int | None = None
    block_size: int | None = None
    supervised_tokens_per_update: float | None = None
    supervised_tokens: int | None = None
    data: str | None = None
    held_out: str | None = None
    best_step: int | None = None
    metrics: dict[str, Measured] | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Table:
    """The rows of a sweep, the best run first.

    Attributes:
        rule: by which the runs are ranked; None without a readable run.
        notes: warnings for a reader who compares the rows.
        reports: of the runs that can be read, by the name of the run.
    """

    rule: Rule | None
    rows: list[Row]
    notes: list[str]
    reports: dict[str, RunReport]

    @property
    def winner(self) -> Row | None:
        """The row that ranks first; of equal ones the first in order of names."""
        return self.rows[0] if self.rows and self.rows[0].rank == 1 else None

    @property
    def varied(self) -> dict[str, str]:
        """The keys that differ between the runs, each with its short name."""
        return short_names(list(dict.fromkeys(key for row in self.rows for key in row.varied)))

    @property
    def metrics(self) -> list[str]:
        """The names of the held-out metrics, those of the ranking first."""
        ranked = [order.metric for order in self.rule.ranking] if self.rule else []
        names = dict.fromkeys([*ranked, *(name for row in self.rows for name in row.metrics or {})])
        return [name for name in names if any(name in (row.metrics or {}) for row in self.rows)]


def read_table(places: Sequence[Path]) -> Table:
    """Read the runs in these places.

    Args:
        places: each a run's folder, or a folder of runs such as a sweep's.

    Raises:
        DataError: there is no run in one of them.
    """
    found: dict[Path, JobFile | None] = {}
    for place in places:
        found |= _runs_in(place)
    reports: dict[Path, RunReport] = {}
    faults: dict[Path, str] = {}
    for folder in found:
        if not is_run(folder):
            continue
        try:
            reports[folder] = read_report(folder)
        except UserError as error:
            faults[folder] = str(error)
    names = _names(list(found), places)
    varied = _varied(found, reports)
    rows = [
        _row(names[f], f, job, reports.get(f), faults.get(f, ""), varied[f])
        for f, job in found.items()
    ]
    rules = {str(report.rule): report.rule for report in reports.values()}
    rule = next(iter(rules.values()), None)
    by_name = {names[folder]: report for folder, report in reports.items()}
    return Table(rule, _ranked(rows, by_name, rule), _notes(list(rules), rows), by_name)


def is_run(folder: Path) -> bool:
    """Return True for the folder of a run."""
    return all((folder / name).is_file() for name in RUN_FILES)


def _runs_in(place: Path) -> dict[Path, JobFile | None]:
    """Return the folders of runs in a place, each with its job if a sweep made it."""
    if is_run(place):
        jobs = {job.name: job for job in read_jobs(place.parent)}
        return {place: jobs.get(place.name)}
    if not place.is_dir():
        raise DataError(f"{place} is not a folder; give a run's folder, or a folder of runs.")
    jobs = {job.name: job for job in read_jobs(place)}
    inside = [each for each in sorted(place.iterdir()) if each.name not in jobs and is_run(each)]
    found = {place / name: job for name, job in jobs.items()} | dict.fromkeys(inside)
    if not found:
        raise DataError(
            f"{place} holds no run (a folder with {' and '.join(RUN_FILES)}). Give a run's folder, "
            "<output_dir>/<run_name>, or a folder of runs."
        )
    return found


def _names(folders: Sequence[Path], places: Sequence[Path]) -> dict[Path, str]:
    """Return the name of each run: its folder's, with the one above where several places have
    it."""
    own = [folder.absolute().name for folder in folders]
    return {
        folder: name
        if len(places) == 1 or own.count(name) == 1
        else f"{folder.absolute().parent.name}/{name}"
        for folder, name in zip(folders, own, strict=True)
    }


def _varied(
    found: Mapping[Path, JobFile | None], reports: Mapping[Path, RunReport]
) -> dict[Path, dict[str, str]]:
    """Return what differs: as given to the sweep if one made all runs, else by their configs."""
    jobs = {folder: job for folder, job in found.items() if job is not None}
    keys = {tuple(job.varied) for job in jobs.values()}
    if len(jobs) == len(found) and len(keys) == 1:
        return {folder: job.varied for folder, job in jobs.items()}
    flat = {folder: _settings(job, reports.get(folder)) for folder, job in found.items()}
    known = [settings for settings in flat.values() if settings]
    names = dict.fromkeys(key for settings in known for key in settings)
    differing = [
        key
        for key in names
        if not key.startswith(INCIDENTAL) and len({str(each.get(key)) for each in known}) > 1
    ]
    return {
        folder: {key: shown(settings.get(key)) for key in differing} if settings else {}
        for folder, settings in flat.items()
    }


def _settings(job: JobFile | None, report: RunReport | None) -> dict[str, Any]:
    config = report.config if report is not None else job.config if job is not None else {}
    return dict(flat_keys(config))


# Rows ---------------------------------------------------------------------------------------------


def _row(
    name: str,
    folder: Path,
    job: JobFile | None,
    report: RunReport | None,
    fault: str,
    varied: dict[str, str],
) -> Row:
    failed = fault or (job.message if job is not None and job.code not in STOPPED else "")
    state: State = "unfinished"
    if report is not None and report.finished and not failed:
        state = "finished"
    elif failed:
        state = "failed"
    elif report is None:
        state = "not started"
    row = Row(name, str(folder), state, None, failed, varied)
    if report is None:
        return row
    facts = report.facts
    trained = facts.parameters if facts.trained is None else facts.trained
    return replace(
        row,
        parameterization=parameterization(report.config),
        trained_parameters=trained,
        parameters=facts.parameters,
        block_size=facts.block_size,
        supervised_tokens_per_update=facts.supervised_per_update,
        supervised_tokens=round(facts.supervised_per_update * report.last_step),
        data=facts.fingerprints.get("data"),
        held_out=facts.fingerprints.get("eval"),
        best_step=report.best,
        metrics=_measured(report),
        seconds=None if report.goodput is None else report.goodput.wall_seconds,
    )


def parameterization(config: Mapping[str, Any]) -> str:
    """Return which weights a config trains: all, or an adapter of a kind and rank."""
    adapter = config.get("adapter") or {}
    rank = adapter.get("rank")
    if rank is None and adapter.get("pretrained") is None:
        return "all weights"
    quantized = adapter.get("base_dtype") == "nf4"
    kind = ("QDoRA" if quantized else "DoRA") if adapter.get("dora") else "LoRA"
    kind = "QLoRA" if quantized and kind == "LoRA" else kind
    told = kind if rank is None else f"{kind} rank {rank}"
    return f"{told}, int8 base" if adapter.get("base_dtype") == "int8" else told


def _measured(report: RunReport) -> dict[str, Measured]:
    """Return the metrics of the best step; of the last one if none qualifies."""
    chosen = [one for one in report.history if one.step == report.best] or report.history[-1:]
    found = {}
    for name, value in chosen[0].scores.items() if chosen else ():
        graded = chosen[0].graded.get(name)
        found[name] = (
            Measured(value)
            if graded is None
            else Measured(value, graded["low"], graded["high"], graded["count"])
        )
    return found


def _ranked(rows: Sequence[Row], reports: Mapping[str, RunReport], rule: Rule | None) -> list[Row]:
    """Return the rows with their ranks, in order of them; equal runs have the same rank."""
    ranks: dict[str, Rank] = {}
    for row in rows:
        if row.state == "finished" and rule is not None and row.best_step is not None:
            rank = rule.rank(reports[row.run].best_scores)
            if rank is not None:
                ranks[row.run] = rank
    placed = [
        replace(row, rank=1 + sum(other < ranks[row.run] for other in ranks.values()))
        if row.run in ranks
        else row
        for row in rows
    ]
    order: list[State] = ["finished", "unfinished", "not started", "failed"]
    return sorted(placed, key=lambda r: (r.rank is None, r.rank or 0, order.index(r.state), r.run))


def _notes(rules: Sequence[str], rows: Sequence[Row]) -> list[str]:
    notes = []
    if len(rules) > 1:
        told = " | ".join(rules)
        notes.append(f"The runs have different selection rules ({told}); the first one ranks them.")
    for what, told in (("held_out", "held-out rows"), ("data", "training rows")):
        prints = {getattr(row, what) for row in rows if getattr(row, what) is not None}
        if len(prints) > 1:
            more = "; their metrics cannot be compared." if what == "held_out" else "."
            notes.append(f"The runs have {len(prints)} different sets of {told}{more}")
    return notes
