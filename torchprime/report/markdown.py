"""The writer of report.md: a run's report as Markdown that is readable as plain text, too.

Text from rows, answers and names is escaped (text/markdown_text.py).
"""

from __future__ import annotations

from collections.abc import Iterator

from torchprime.data.page import by_count, first_of
from torchprime.report.answers import AskedRow, grade, shorten
from torchprime.report.read import RunReport
from torchprime.text.markdown_text import block, inline, table


def markdown(report: RunReport) -> str:
    """Return the file's text."""
    return "\n".join([f"# {inline(report.name)}", "", *_sections(report)]) + "\n"


def _sections(report: RunReport) -> Iterator[str]:
    for message in report.messages:
        warning = message.removeprefix("warning: ")
        yield f"- **Warning:** {inline(warning)}" if warning != message else f"- {inline(message)}"
    yield ""
    if report.rows:
        yield "## What training changed\n"
        yield f"With 95% intervals. {inline(report.lower_note)}".rstrip() + "\n"
        yield from [*table(report.headings, report.rows), ""]
        yield "## Evaluations\n"
        yield from [*_evaluations(report), ""]
    if report.gates and report.history:
        yield "## Gates\n"
        yield from [*table(["gate", "steps that pass", "steps that fail"], report.gates), ""]
    if report.answers is not None:
        yield from _answers(report)
    yield "## Export\n"
    yield from [*_export(report), ""]
    yield "## Data\n"
    yield from _data(report)
    yield "## Run\n"
    facts = {**report.run_facts, **{f"time, {name}": t for name, t in report.times.items()}}
    yield from [*table(["", ""], list(facts.items())), ""]
    if report.goodput_rows:
        yield "## Time\n"
        yield inline(report.goodput_note) + "\n"
        yield from [*table(["use", "seconds", "share"], report.goodput_rows), ""]
    yield "## Fingerprints\n"
    yield from table(["", "sha256"], list(report.fingerprints.items()))


def _evaluations(report: RunReport) -> list[str]:
    names = list(dict.fromkeys(name for one in report.history for name in one.scores))
    rows = []
    for one in report.history:
        trained = "-" if one.train_loss is None else f"{one.train_loss:.4f}"
        mark = " (best)" if one.step == report.best else ""
        values = [one.scores.get(name) for name in names]
        shown = ["-" if value is None else f"{value:,.4f}" for value in values]
        rows.append([f"{one.step:,}{mark}", trained, *shown])
    return table(["step", "train loss since the one before", *names], rows)


def _answers(report: RunReport) -> Iterator[str]:
    answers = report.answers
    assert answers is not None
    yield "## Answers\n"
    told = ", ".join(f"{count:,} {change}" for change, count in answers.counts.items())
    yield (f"By {inline(answers.by)}: {told}.\n" if answers.by else "Not graded.\n")
    for row in answers.rows:
        yield from _row(row)


def _row(row: AskedRow) -> Iterator[str]:
    yield f"### {inline(row.row_id)}: {row.change}\n"
    yield from ["Asked:", "", *block(shorten(row.prompt)), "", "The row's own answer:", ""]
    yield from [*block(shorten(row.reference)), ""]
    for heading, (sample, grades) in row.answers.items():
        told = [f"{inline(name)} {grade(value)}" for name, value in grades.items()]
        told += [] if sample.stopped else ["cut off by the limit"]
        yield f"**{inline(heading)}**" + (f" ({', '.join(told)})" if told else "") + ":\n"
        yield from [*block(shorten(sample.output)), ""]


def _export(report: RunReport) -> Iterator[str]:
    export = report.export
    if export is None:
        yield "The config asks for none."
        return
    yield f"{inline(export.path)}: {inline(export.told)}."
    if export.certificate is None:
        return
    marks = {True: "passed", False: "FAILED", None: "not made"}
    yield ""
    checks = export.certificate.checks
    yield from table(
        ["check", "", "what it says"], [[c.name, marks[c.passed], c.detail] for c in checks]
    )


def _data(report: RunReport) -> Iterator[str]:
    for data in report.data:
        yield f"- {inline(data.summary())}"
    yield ""
    for data in report.data:
        if data.rejected:
            rows = [[r, f"{len(i):,}", first_of(i)] for r, i in by_count(data.rejected)]
            headings = [f"rejected in {data.section} because", "rows", "the first"]
            yield from [*table(headings, rows), ""]
    if report.leaks is not None:
        yield f"Leak check: {inline(report.leaks.summary())}."
        yield ""
