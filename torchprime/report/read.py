"""Reader of a run's folder for its report.

    config.yaml, run.json, metrics.jsonl, data_report.json, evaluations/, the export's certificate
    ->  RunReport  ->  report.md (markdown.py), report.html (html_page.py)

Nothing but these files is read, so a report can be made again on any machine. The best step and the
reason for the choice are computed again from the records, by the run's own rules.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from torchprime.checkpoint.proof.certificate import CERTIFICATE, Certificate, read_certificate
from torchprime.config.sections.evaluation import LOSSES, source_loss
from torchprime.data.leaks.report import LeakReport
from torchprime.data.report import DataReport
from torchprime.errors import DataError
from torchprime.evaluation.before_after import columns, table
from torchprime.evaluation.behaviour import samples_file
from torchprime.evaluation.directions import lower_is_better
from torchprime.evaluation.selection import (
    EarlyStopping,
    Evaluated,
    Rule,
    overfitting,
    parse_rule,
    with_base,
)
from torchprime.files.atomic import read_regular_text
from torchprime.metrics.goodput import Goodput, read_account
from torchprime.metrics.record import EvalRecord, SpikeRecord, StepRecord
from torchprime.metrics.writers import read_metrics
from torchprime.report.answers import Answers, read_answers
from torchprime.report.run_facts import RunFacts

USE_NAMES = {
    "start": "start-up",
    "compile": "compiling",
    "data": "waiting for a batch",
    "step": "steps whose work is kept",
    "evaluation": "held-out loss and answers",
    "checkpoint": "waiting for checkpoints",
    "export": "export",
    "lost": "lost to restarts",
    "other": "other",
}
MOST_BYTES = 64 << 20  # of config.yaml, run.json or data_report.json


@dataclass(frozen=True)
class Export:
    """The export that the config asks for.

    Attributes:
        told: a text about it for a person.
        there: it was made.
        certificate: None if there is none.
    """

    path: str
    told: str
    there: bool
    certificate: Certificate | None = None


@dataclass(frozen=True)
class RunReport:
    """The data of a run's report.

    Attributes:
        facts: from run.json.
        steps, evaluations: the records of metrics.jsonl, in the order of steps.
        rule: by which the run chooses its best step.
        best: the step that the run's rule puts first; None if none qualifies.
        finished: all steps are done, or early stopping ended the run.
        messages: what happened, for a person; warnings are those that start with "warning: ".
        headings, rows: base, last and best compared (before_after.table); none where nothing was
            held out.
        gates: of the run's rule, with the steps that pass and fail each (Rule.gate_rows).
        answers: to the same held-out rows, side by side; None where none were generated.
        times: seconds, by what they went to.
        goodput: the account of the run's wall clock; None for a run of a version without it.
        lower: the graders for which lower is better.
    """

    name: str
    config: Mapping[str, Any]
    facts: RunFacts
    steps: list[StepRecord]
    evaluations: list[EvalRecord]
    history: list[Evaluated]
    rule: Rule
    best: int | None
    finished: bool
    messages: list[str]
    headings: list[str]
    rows: list[list[str]]
    gates: list[list[str]]
    answers: Answers | None
    data: list[DataReport]
    leaks: LeakReport | None
    export: Export | None
    times: dict[str, str]
    goodput: Goodput | None
    lower: list[str]

    @property
    def lower_note(self) -> str:
        """The sentence that names the graders for which lower is better; "" if there are none."""
        return f"Lower is better: {', '.join(self.lower)}." if self.lower else ""

    @property
    def best_scores(self) -> dict[str, float]:
        """The scores of the best step, with those of the first evaluation for the gates."""
        best = next(one for one in self.history if one.step == self.best)
        return with_base(best.scores, self.history[0].scores)

    @property
    def last_step(self) -> int:
        """The last step that has a record."""
        return _last_step(self.steps, self.history)

    @property
    def goodput_rows(self) -> list[list[str]]:
        """Use of the wall clock, seconds, share; the largest first."""
        if self.goodput is None:
            return []
        spent = sorted(self.goodput.seconds.items(), key=lambda pair: -pair[1])
        wall = max(self.goodput.wall_seconds, 1e-9)
        return [
            [USE_NAMES[use], f"{seconds:,.1f}", f"{seconds / wall:.1%}"]
            for use, seconds in spent
            if seconds
        ]

    @property
    def goodput_note(self) -> str:
        """The sentence above these rows."""
        g = self.goodput
        if g is None:
            return ""
        starts = f" in {g.starts} starts" if g.starts > 1 else ""
        return f"Goodput {g.share:.1%} of {g.wall_seconds:,.1f} s{starts}."

    @property
    def mesh(self) -> str:
        """The axes with more than one device, and the number of devices."""
        return self.facts.used_mesh

    @property
    def run_facts(self) -> dict[str, str]:
        """The model, data and devices of the run."""
        return self.facts.rows()

    @property
    def fingerprints(self) -> dict[str, str]:
        """The fingerprints of data, held-out data, tokenizer and template."""
        return self.facts.fingerprints


def read_report(folder: Path) -> RunReport:
    """Read a run's report from its folder.

    Raises:
        DataError: no folder of a run, or a file of it is missing or damaged; naming the file.
        CheckpointError: the certificate of its export is damaged.
    """
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder; give a run's folder, <output_dir>/<run_name>.")
    config = _read(folder / "config.yaml", yaml.safe_load)
    facts = _read(folder / "run.json", json.loads)
    records = read_metrics(folder / "metrics.jsonl")
    try:
        return _gather(folder, config, facts, records)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(
            f"{folder}: config.yaml, run.json, metrics.jsonl or data_report.json lacks what a run "
            f"writes there ({type(error).__name__}: {error}); it was edited, or is another "
            "version's. Use the version that wrote it (run.json names it)."
        ) from error


def _read(path: Path, parse: Callable[[str], object]) -> dict[str, Any]:
    """Return a mapping from a file of the run."""
    try:
        content = parse(read_regular_text(path, MOST_BYTES))
        if not isinstance(content, dict):
            raise ValueError(f"it is {type(content).__name__}")
    except FileNotFoundError as error:
        raise DataError(
            f"{path} is missing; a run writes it before its first step. Give a run's folder, "
            "<output_dir>/<run_name>."
        ) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise DataError(
            f"{path}: cannot be read ({' '.join(str(error).split())[:200]}), expected what the run "
            "wrote."
        ) from error
    return content


def _gather(
    folder: Path, config: dict[str, Any], facts: dict[str, Any], records: list[dict[str, Any]]
) -> RunReport:
    run_facts = RunFacts.from_dict(facts)
    steps = [StepRecord.from_dict(record) for record in _of_kind(records, "train")]
    evaluations = [EvalRecord.from_dict(record) for record in _of_kind(records, "eval")]
    spikes = [SpikeRecord.from_dict(record) for record in _of_kind(records, "spike")]
    stalls = [record["stall_seconds"] for record in records if record["kind"] == "checkpoint"]
    history = [Evaluated.of(record.to_dict()) for record in evaluations]
    rule = _rule(config)
    best = rule.best(history)
    headings, rows = table(history, best) if history else ([], [])
    kinds = {grader["name"]: grader["kind"] for grader in _graders(config)}
    lower = lower_is_better(kinds, rule, _stopping(config))
    export = _export(folder, config)
    data, leaks = _data(folder / "data_report.json")
    return RunReport(
        name=folder.absolute().name,
        config=config,
        facts=run_facts,
        steps=steps,
        evaluations=evaluations,
        history=history,
        rule=rule,
        best=best,
        finished=_ending(config, run_facts, steps, history).finished,
        messages=_messages(config, run_facts, steps, history, rule, export, spikes),
        headings=headings,
        rows=rows,
        gates=rule.gate_rows(history),
        answers=_answers(folder, history, best, rule, lower),
        data=data,
        leaks=leaks,
        export=export,
        times=_times(steps, evaluations, stalls),
        goodput=read_account(folder),
        lower=lower,
    )


def _of_kind(records: Sequence[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Return one record of each step, the last that was written."""
    return sorted(
        {record["step"]: record for record in records if record["kind"] == kind}.values(),
        key=lambda record: record["step"],
    )


def _rule(config: Mapping[str, Any]) -> Rule:
    selection = config["selection"]
    known = [*LOSSES, *(grader["name"] for grader in _graders(config))]
    for each in (*config["eval"].get("sources", ()), *config["dataset"].get("mixture", ())):
        known.append(source_loss(each["name"]))
    return parse_rule(selection["gates"], selection["ranking"], known)


def _graders(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return config["eval"]["graders"]


# Events of the run --------------------------------------------------------------------------------


def _messages(
    config: Mapping[str, Any],
    facts: RunFacts,
    steps: Sequence[StepRecord],
    history: Sequence[Evaluated],
    rule: Rule,
    export: Export | None,
    spikes: Sequence[SpikeRecord],
) -> list[str]:
    messages = [_ending(config, facts, steps, history).told]
    if len(facts.starts) > 1:
        told = ", ".join(f"{step:,}" for step in facts.starts[1:])
        messages.append(
            f"The run was started {len(facts.starts)} times; it resumed after step {told}."
        )
    messages += spike_messages(spikes)
    if history:
        messages.append(_selection(config, history, rule, export))
    for end in range(3, len(history) + 1):
        if (warning := overfitting(history[:end])) is not None:
            messages.append(f"warning: {warning}.")
    return messages


class _Ending(NamedTuple):
    """The end of a run, for a person."""

    finished: bool
    told: str


def _ending(
    config: Mapping[str, Any],
    facts: RunFacts,
    steps: Sequence[StepRecord],
    history: Sequence[Evaluated],
) -> _Ending:
    done, total = _last_step(steps, history), facts.total_steps
    if done >= total:
        return _Ending(True, f"All {total:,} steps are done.")
    stopping = _stopping(config)
    stopped = stopping.reason(history) if stopping is not None and history else None
    if stopped is not None:
        return _Ending(True, f"Early stopping after step {done:,} of {total:,}: {stopped}.")
    told = f"warning: the run is not finished: step {done:,} of {total:,} was logged."
    return _Ending(False, told)


def spike_messages(spikes: Sequence[SpikeRecord]) -> list[str]:
    """Return a warning about the updates that were skipped as spikes, and one about the others."""
    messages = []
    for skipped, done in ((True, "were skipped as spikes"), (False, "were spikes and made")):
        steps = [f"{spike.step:,}" for spike in spikes if spike.skipped == skipped]
        if steps:
            more = f" and {len(steps) - 10:,} more" if len(steps) > 10 else ""
            told = f"{', '.join(steps[:10])}{more}"
            messages.append(
                f"warning: {len(steps):,} updates {done}: steps {told}. metrics.jsonl has their "
                "values and the hashes of their batches."
            )
    return messages


def _last_step(steps: Sequence[StepRecord], history: Sequence[Evaluated]) -> int:
    return max([0, *(record.step for record in steps), *(one.step for one in history)])


def _stopping(config: Mapping[str, Any]) -> EarlyStopping | None:
    given = config["selection"]["early_stopping"]
    if given["metric"] is None:
        return None
    highest = given["mode"] == "max"
    return EarlyStopping(given["metric"], highest, given["patience"], given["min_delta"])


def _selection(
    config: Mapping[str, Any], history: Sequence[Evaluated], rule: Rule, export: Export | None
) -> str:
    best = rule.best(history)
    if best is not None:
        return f"Step {best:,} is the best of the evaluated ones, by {rule}."
    failed = rule.failed_at_end(history)
    told = f"warning: no step qualifies by {rule}"
    told += f" (the last one: not {failed})" if failed else ""
    if config["export"]["which"] != "best":
        return f"{told}."
    if export is None:
        return f"{told}; nothing is exported, since task.export_checkpoint_path is null."
    instead = "the last one is exported instead" if export.there else "no export was made"
    return f"{told}; {instead}."


def _times(
    steps: Sequence[StepRecord], evaluations: Sequence[EvalRecord], stalls: Sequence[float]
) -> dict[str, str]:
    """Return the seconds by use; a logged step's is the mean since the one before."""
    found = {}
    numbers = [0, *(record.step for record in steps)]
    spent = [(b - a) * r.step_seconds for (a, b), r in zip(pairwise(numbers), steps, strict=True)]
    if spent:
        tokens = steps[-1].supervised_tokens_per_s
        found["steps"] = f"{sum(spent):,.1f} s, at the end {tokens:,.0f} supervised tokens per s"
    if evaluations:
        seconds = sum(record.seconds for record in evaluations)
        share = evaluations[-1].share_of_run
        part = "" if share is None else f", {share:.1%} of the run since its last start"
        found["evaluations"] = f"{seconds:,.1f} s for {len(evaluations)}{part}"
    if stalls:
        found["checkpoints"] = f"{sum(stalls):,.1f} s of waiting in training for {len(stalls)}"
    return found


# The other files ----------------------------------------------------------------------------------


def _answers(
    folder: Path,
    history: Sequence[Evaluated],
    best: int | None,
    rule: Rule,
    lower: Sequence[str],
) -> Answers | None:
    if not history:
        return None
    files = {
        heading: path
        for heading, one in columns(history, best).items()
        if (path := samples_file(folder, one.step)).is_file()
    }
    return read_answers(files, [o.metric for o in rule.ranking], lower) if files else None


def _data(path: Path) -> tuple[list[DataReport], LeakReport | None]:
    content = _read(path, json.loads)
    reports = [
        DataReport.from_dict(content[name]) for name in ("dataset", "eval") if name in content
    ]
    return reports, LeakReport.from_dict(content["leaks"]) if "leaks" in content else None


def _export(folder: Path, config: Mapping[str, Any]) -> Export | None:
    given = config["task"]["export_checkpoint_path"]
    if given is None:
        return None
    out = folder / given
    if not out.is_dir():
        return Export(given, "not there", False)
    if not (out / CERTIFICATE).is_file():
        return Export(given, "there, without a certificate", True)
    certificate = read_certificate(out)
    return Export(given, f"{certificate.origin}; {certificate.tally()}", True, certificate)
