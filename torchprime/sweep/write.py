"""The files of a sweep's result: sweep.json, sweep.md, sweep.html, curves.svg, winner.yaml."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import yaml

from torchprime.config.compose import SCHEMA_NODE
from torchprime.data.page import render_page
from torchprime.errors import RuntimeSetupError
from torchprime.files.atomic import make_folder, write_json, write_text
from torchprime.files.private_folders import require_private
from torchprime.metrics.writers import format_duration
from torchprime.sweep.figure import charts_of, standalone, svg_of
from torchprime.sweep.groups import SEED, OverSeeds, groups_of
from torchprime.sweep.rows import Measured, Row, Table, read_table
from torchprime.text.markdown_text import inline, table

JSON, MARKDOWN, PAGE, FIGURE, WINNER = (
    "sweep.json", "sweep.md", "sweep.html", "curves.svg", "winner.yaml",
)  # fmt: skip
NOT_OF_A_CONFIG = ("output_dir", "run_name", "resume")
SEEDS_NOTE = (
    "Means over the seeds, ranked by the same rule. In brackets: 95% intervals of all answers "
    "together. Elsewhere the lowest and the highest run."
)
SHOWN_DIGITS = 8  # of a value in the table
SHOWN_CHARACTERS = 12  # of a fingerprint


def write_sweep(places: Sequence[Path], folder: Path) -> Table:
    """Write the result of these runs into a folder, and return their table.

    Args:
        places: each a run's folder, or a folder of runs such as a sweep's.

    Raises:
        UserError: there is no run, or a file cannot be written.
    """
    found = read_table(places)
    name = folder.absolute().name
    texts = {
        MARKDOWN: markdown(found, name),
        PAGE: render_page("sweep", **_page(found, name)),
        FIGURE: standalone(charts_of(found)),
    }
    if (config := winner_yaml(found)) is not None:
        texts[WINNER] = config
    require_private(folder, "--out")
    try:
        make_folder(folder)
        for file, text in texts.items():
            write_text(folder / file, text)
        write_json(folder / JSON, _content(found))
    except OSError as error:
        raise RuntimeSetupError(
            f"{folder}: the sweep's result cannot be written there ({error.strerror}). Make room, "
            "or name another folder: torchprime sweep report DIR --out FOLDER."
        ) from error
    if WINNER not in texts:
        (folder / WINNER).unlink(missing_ok=True)
    return found


def summary_lines(found: Table, folder: Path) -> list[str]:
    """Return a sweep's table for the terminal, and the paths of the result in its folder."""
    headings, rows = short_table(found)
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    ]
    told = [f"note: {note}" for note in found.notes]
    return [*lines, *told, f"{folder / MARKDOWN} and {folder / PAGE}"]


def _content(found: Table) -> dict[str, object]:
    """Return the content of sweep.json."""
    return {
        "rule": None if found.rule is None else str(found.rule),
        "varied": list(found.varied),
        "winner": None if found.winner is None else found.winner.run,
        "notes": found.notes,
        "over_seeds": [asdict(group) for group in groups_of(found)],
        "rows": [asdict(row) for row in found.rows],
    }


# Tables -------------------------------------------------------------------------------------------


def shown_measure(measured: Measured | None) -> str:
    """Return a metric with its interval; shares of answers in percent."""
    if measured is None:
        return "-"
    if measured.low is None or measured.high is None:
        return f"{measured.value:,.4f}"
    if 0 <= measured.low <= measured.high <= 1:
        return f"{measured.value:.1%} ({100 * measured.low:.1f} to {100 * measured.high:.1f})"
    return f"{measured.value:.3g} ({measured.low:.3g} to {measured.high:.3g})"


def short_table(found: Table) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: rank, what differs, the metrics at the best step, state."""
    keys, metrics = found.varied, found.metrics
    rows = []
    for row in found.rows:
        measured = row.metrics or {}
        rows.append(
            [
                "-" if row.rank is None else str(row.rank),
                *(_short(row.varied.get(key, "-")) for key in keys),
                *(shown_measure(measured.get(name)) for name in metrics),
                "-" if row.best_step is None else f"{row.best_step:,}",
                "-" if row.seconds is None else format_duration(row.seconds),
                row.state,
            ]
        )
    return ["rank", *keys.values(), *metrics, "best step", "time", "state"], rows


def seeds_table(found: Table) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of the runs over their seeds; no rows for a sweep without seeds."""
    keys = [key for key in found.varied if key != SEED]
    rows = []
    for group in groups_of(found):
        cells = (_shown_over_seeds(group.metrics.get(name)) for name in found.metrics)
        rank = "-" if group.rank is None else str(group.rank)
        values = (_short(group.varied.get(key, "-")) for key in keys)
        rows.append([rank, *values, str(len(group.runs)), *cells])
    return ["rank", *(found.varied[key] for key in keys), "seeds", *found.metrics], rows


def _shown_over_seeds(over: OverSeeds | None) -> str:
    if over is None:
        return "-"
    if over.low is None or over.high is None:
        return f"{over.mean:,.4f}, {over.lowest:,.4f} to {over.highest:,.4f}"
    return f"{over.mean:.1%} ({100 * over.low:.1f} to {100 * over.high:.1f})"


def _short(value: str) -> str:
    """Return a value for the table; a number with many digits has four."""
    if value.count(".") != 1 or len(value) <= SHOWN_DIGITS:
        return value
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def facts_table(found: Table) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of what each run was made from."""
    headings = [
        *("run", "trained", "trained parameters", "block size", "supervised tokens per update"),
        *("supervised tokens in all", "data"),
    ]
    return headings, [[row.run, *_facts(row)] for row in found.rows]


def _facts(row: Row) -> Iterator[str]:
    yield row.parameterization or "-"
    share = ""
    if row.trained_parameters and row.parameters and row.trained_parameters != row.parameters:
        share = f" ({row.trained_parameters / row.parameters:.1%})"
    yield _count(row.trained_parameters) + share
    yield _count(row.block_size)
    yield _count(row.supervised_tokens_per_update)
    yield _count(row.supervised_tokens)
    yield (row.data or "-")[:SHOWN_CHARACTERS]


def _count(number: float | None) -> str:
    return "-" if number is None else f"{number:,.0f}"


def failures(found: Table) -> list[list[str]]:
    """Return the name and the message of each run that failed or cannot be read."""
    return [[row.run, row.message] for row in found.rows if row.message]


def headline(found: Table) -> str:
    """Return the sentence about the winner and the rule."""
    finished = sum(row.state == "finished" for row in found.rows)
    told = f"{finished} of {len(found.rows)} runs are finished."
    if found.rule is None:
        return told
    winner = found.winner
    if winner is None:
        return f"{told} No run qualifies by {found.rule}."
    return f"{told} {winner.run} is the best, by {found.rule}; its config is in {WINNER}."


# Files --------------------------------------------------------------------------------------------


def markdown(found: Table, name: str) -> str:
    """Return the text of sweep.md."""
    lines = [f"# {inline(name)}", "", inline(headline(found)), ""]
    lines += [f"- **Warning:** {inline(note)}" for note in found.notes]
    lines += ["", *table(*short_table(found)), "", "Metrics are of each run's best step."]
    lines += ["In brackets: 95% intervals.", ""]
    if failed := failures(found):
        lines += ["## Runs that failed", "", *table(["run", "message"], failed), ""]
    if found.reports:
        lines += ["## Curves", "", f"![Losses and scores of the runs, by step]({FIGURE})", ""]
    lines += ["## What each run was made from", "", *table(*facts_table(found)), ""]
    return "\n".join(lines)


def _page(found: Table, name: str) -> dict[str, object]:
    """Return the values of the page's template."""
    headings, rows = short_table(found)
    facts_headings, facts = facts_table(found)
    seeds_headings, over_seeds = seeds_table(found)
    return {
        "title": name,
        "headline": headline(found),
        "notes": found.notes,
        "headings": headings,
        "rows": rows,
        "winner": found.winner is not None,
        "seeds_headings": seeds_headings,
        "over_seeds": over_seeds,
        "seeds_note": SEEDS_NOTE,
        "failures": failures(found),
        "facts_headings": facts_headings,
        "facts": facts,
        "charts": charts_of(found),
        "svg": svg_of,
    }


def winner_yaml(found: Table) -> str | None:
    """Return the config of the winner, which `--config-dir FOLDER --config-name winner` reads; None
    without a winner."""
    winner = found.winner
    if winner is None:
        return None
    config = dict(found.reports[winner.run].config)
    for key in NOT_OF_A_CONFIG:
        config.pop(key, None)
    content = {"defaults": [SCHEMA_NODE, "_self_"], **config}
    return f"# The config of {inline(winner.run)}, the best run of its sweep.\n" + yaml.safe_dump(
        content, sort_keys=False
    )
