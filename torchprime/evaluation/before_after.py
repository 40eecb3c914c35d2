"""A table of the scores of base, last and best step, with confidence intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torchprime.evaluation.selection import Evaluated
from torchprime.metrics.writers import shown


def columns(history: Sequence[Evaluated], best_step: int | None) -> dict[str, Evaluated]:
    """Return the evaluations to compare, by heading: those with the most metrics.

    Args:
        history: in the order of steps.
        best_step: which of them was chosen; None if none was.
    """
    first, last = history[0], history[-1]
    found = {}
    if last is not first or first.step == 0:
        found["base" if first.step == 0 else f"start (step {first.step})"] = first
    if last.step:
        both = " = best" if best_step == last.step else ""
        found[f"last{both} (step {last.step})"] = last
    best = [one for one in history if one.step == best_step != last.step]
    if best:
        found[f"best (step {best_step})"] = best[0]
    return found


def table(history: Sequence[Evaluated], best_step: int | None) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows: a metric's name, with its count, and its value in each column."""
    return table_of(columns(history, best_step))


def table_of(chosen: Mapping[str, Evaluated]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of these evaluations, by heading; see `table`."""
    names = list(dict.fromkeys(name for one in chosen.values() for name in one.scores))
    rows = []
    for name in names:
        counts = {s["count"] for one in chosen.values() if (s := one.graded.get(name))}
        label = name + (f" (n={counts.pop()})" if len(counts) == 1 else "")
        rows.append([label, *(_cell(one, name) for one in chosen.values())])
    return ["", *chosen], rows


def _cell(one: Evaluated, name: str) -> str:
    score = one.graded.get(name)
    if score is not None:
        return shown(score)
    value = one.scores.get(name)
    return "-" if value is None else f"{value:,.4f}"


def table_lines(history: Sequence[Evaluated], best_step: int | None) -> list[str]:
    """Return the table for a terminal; 95% intervals in brackets."""
    return lines_of(*table(history, best_step))


def lines_of(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table's lines, in columns."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (headings, *rows)
    ]
