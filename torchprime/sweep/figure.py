"""The curves of a sweep's runs over each other: losses, and the metric that ranks the runs.

The page draws them with its own style (report/curves.py); curves.svg is the same with a style
inside, for sweep.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup, escape

from torchprime.report.curves import (
    HEIGHT,
    WIDTH,
    Chart,
    Series,
    heldout_points,
    svg,
    training_points,
)
from torchprime.report.read import RunReport
from torchprime.sweep.rows import Table

DRAWN = 6  # runs with a colour of their own; a figure with more cannot be read
LINE, CAPTION = 16, 24  # heights
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#b0568f", "#7a6a00", "#7a4fa3")
STYLE = (
    ".curve text,.key{font:11px sans-serif;fill:#667079}.title{font:bold 12px sans-serif}"
    ".curve text.y{text-anchor:end;dominant-baseline:middle}.curve text.x{text-anchor:middle}"
    ".grid{stroke:#e3e6e9}.line{fill:none;stroke-width:1.6}.band{opacity:.16}"
    + "".join(
        f".line.c{n}{{stroke:{colour}}}.band.c{n},.dot.c{n}{{fill:{colour}}}"
        for n, colour in enumerate(COLOURS)
    )
)


def charts_of(found: Table) -> list[tuple[Chart, int]]:
    """Return the charts of the best runs, each with its last step."""
    runs = {row.run: found.reports[row.run] for row in found.rows if row.run in found.reports}
    best = dict(list(runs.items())[:DRAWN])
    if not best:
        return []
    last = max(report.last_step for report in best.values())
    more = f", the best {DRAWN} of {len(runs)} runs" if len(runs) > DRAWN else ""
    training = {name: training_points(run.steps) for name, run in best.items()}
    charts = [Chart(f"Training loss{more}", _series(training))]
    held = {name: heldout_points(run.evaluations) for name, run in best.items()}
    charts.append(Chart(f"Held-out loss{more}", _series(held, dots=True)))
    charts += [_score_chart(metric, best, more) for metric in found.metrics]
    return [(chart, last) for chart in charts if any(each.points for each in chart.series)]


def _series(points: dict[str, list[tuple[int, float]]], dots: bool = False) -> list[Series]:
    return [Series(name, own, dots=dots) for name, own in points.items()]


def _score_chart(metric: str, runs: dict[str, RunReport], more: str) -> Chart:
    """Return the chart of a graded metric with its intervals; an empty one for another metric."""
    series, shares = [], True
    for name, run in runs.items():
        graded = {one.step: one.graded[metric] for one in run.history if metric in one.graded}
        band = {step: (score["low"], score["high"]) for step, score in graded.items()}
        points = [(step, score["value"]) for step, score in graded.items()]
        series.append(Series(name, points, band, dots=True))
        shares &= all(score["interval"] == "wilson" for score in graded.values())
    return Chart(f"{metric}, with 95% intervals{more}", series, percent=shares)


def svg_of(drawn: tuple[Chart, int]) -> Markup:
    """Return a chart for the page."""
    return svg(*drawn, best=None)


def standalone(charts: Sequence[tuple[Chart, int]]) -> str:
    """Return all charts as one SVG file that needs no other."""
    parts, top = [], 0
    for chart, last in charts:
        parts.append(f'<text class="title" x="8" y="{top + 16}">{escape(chart.title)}</text>')
        top += CAPTION
        for place, series in enumerate(chart.series):
            y = top + LINE * place + 8
            parts.append(f'<path class="line c{place}" d="M8 {y}h18"/>')
            parts.append(f'<text class="key" x="32" y="{y + 4}">{escape(series.name)}</text>')
        top += LINE * len(chart.series)
        placed = f'<svg y="{top}" width="{WIDTH}" height="{HEIGHT}" '
        parts.append(str(svg(chart, last, None)).replace("<svg ", placed, 1))
        top += HEIGHT
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{top}" '
        f'viewBox="0 0 {WIDTH} {top}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )
