"""Curves of a run as SVG inside a page, drawn without a library: the page needs no file and no
script.

They take their colours from the page's style, light or dark. A chart has a line, or points, per
series, and a band where an interval is known. If there are very many points, each stretch keeps its
lowest and highest, so that no spike is lost.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup, escape

from torchprime.evaluation.selection import Evaluated
from torchprime.metrics.record import EvalRecord, StepRecord

WIDTH, HEIGHT = 640, 210
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 12, 26
MOST_POINTS = 800

Point = tuple[int, float]


@dataclass(frozen=True)
class Series:
    """A line of a chart; `band` has low and high at each step where they are known."""

    name: str
    points: list[Point]
    band: dict[int, tuple[float, float]] = field(default_factory=dict)
    dots: bool = False


@dataclass(frozen=True)
class Chart:
    """The series that are drawn together, on one scale."""

    title: str
    series: list[Series]
    percent: bool = False


def charts(
    steps: Sequence[StepRecord],
    evaluations: Sequence[EvalRecord],
    history: Sequence[Evaluated],
    lower: Collection[str],
) -> list[Chart]:
    """Return a run's charts from its records: losses, scores, learning rate, gradient norm.

    Args:
        lower: the graders for which lower is better.
    """
    loss = [Series("training", training_points(steps))]
    if evaluations:
        loss.append(Series("held out", heldout_points(evaluations), dots=True))
    for name in dict.fromkeys(n for record in evaluations for n in record.source_losses or {}):
        losses = [(record.step, (record.source_losses or {}).get(name)) for record in evaluations]
        own = [(step, value) for step, value in losses if value is not None]
        loss.append(_series(f"held out, {name}", own, dots=True))
    rates = [(record.step, record.lr) for record in steps]
    norms = [(record.step, record.grad_norm) for record in steps]
    drawn = [
        Chart("Loss, nats per supervised token", loss),
        *_score_charts(history, lower),
        Chart("Learning rate", [_series("learning rate", rates)]),
        Chart("Gradient norm, before clipping", [_series("gradient norm", norms)]),
    ]
    return [chart for chart in drawn if any(each.points for each in chart.series)]


def training_points(steps: Sequence[StepRecord]) -> list[Point]:
    """Return the finite training losses by step."""
    return _finite((record.step, record.loss) for record in steps)


def heldout_points(evaluations: Sequence[EvalRecord]) -> list[Point]:
    """Return the finite held-out losses by step."""
    return _finite((record.step, record.eval_loss) for record in evaluations)


def _finite(points: Iterable[Point]) -> list[Point]:
    return [(step, value) for step, value in points if math.isfinite(value)]


def _series(name: str, points: Iterable[Point], dots: bool = False) -> Series:
    return Series(name, _finite(points), dots=dots)


def _score_charts(history: Sequence[Evaluated], lower: Collection[str]) -> list[Chart]:
    """Return one chart for all shares, and one with its own scale for every other measure."""
    names = list(dict.fromkeys(name for one in history for name in one.graded))
    passes, measures = [], []
    for name in names:
        graded = {one.step: one.graded[name] for one in history if name in one.graded}
        band = {step: (score["low"], score["high"]) for step, score in graded.items()}
        points = [(step, score["value"]) for step, score in graded.items()]
        label = f"{name} (lower is better)" if name in lower else name
        series = Series(label, points, band, dots=True)
        if all(score["interval"] == "wilson" for score in graded.values()):
            passes.append(series)
        else:
            measures.append(Chart(f"{label}, with its 95% interval", [series]))
    shares = [Chart("Grades: share of answers with 1, with 95% intervals", passes, percent=True)]
    return (shares if passes else []) + measures


def thinned(points: Sequence[Point], most: int = MOST_POINTS) -> list[Point]:
    """Return at most so many points: of each stretch the lowest and the highest, in their order."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(len(points) / (most // 2))
    kept: list[Point] = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        kept += sorted(ends)
    return kept


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Return about so many round numbers from low to high."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * size for size in (1, 2, 2.5, 5, 10) if unit * size >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def svg(chart: Chart, last: int, best: int | None) -> Markup:
    """Return the chart, from step 0 to the last; `best` is marked with a line."""
    values = [value for each in chart.series for _, value in each.points]
    values += [end for each in chart.series for pair in each.band.values() for end in pair]
    low, high = (0.0, 1.0) if chart.percent else _range(values)
    scale = _Scale(max(last, 1), low, high)
    parts = [*_grid(scale, chart.percent)]
    if best is not None:
        x = scale.x(best)
        parts.append(f'<line class="best" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    for place, each in enumerate(chart.series):
        parts += _drawn(each, place, scale, chart.percent)
    return Markup(
        f'<svg class="curve" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(chart.title)}">{"".join(parts)}</svg>'
    )


@dataclass(frozen=True)
class _Scale:
    last: int
    low: float
    high: float

    def x(self, step: float) -> str:
        return f"{LEFT + step / self.last * (WIDTH - LEFT - RIGHT):.1f}"

    def y(self, value: float) -> str:
        part = (value - self.low) / (self.high - self.low)
        return f"{HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM):.1f}"


def _range(values: Sequence[float]) -> tuple[float, float]:
    """Return the range of an axis, from 0 if that is near, with some margin; never empty."""
    low, high = min(values), max(values)
    if 0 <= low <= 0.6 * high:
        low = 0.0
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - (room if low else 0.0), high + room


def _grid(scale: _Scale, percent: bool) -> Iterable[str]:
    for value in ticks(scale.low, scale.high):
        y = scale.y(value)
        told = f"{value:.0%}" if percent else f"{value:.4g}"
        yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
        yield f'<text class="y" x="{LEFT - 8}" y="{y}">{told}</text>'
    for step in ticks(0, scale.last, 6):
        if step == int(step):
            x = scale.x(step)
            yield f'<text class="x" x="{x}" y="{HEIGHT - 8}">{int(step):,}</text>'


def _drawn(series: Series, place: int, scale: _Scale, percent: bool) -> Iterable[str]:
    colour = f"c{place % 6}"
    points = thinned(series.points)
    banded = [step for step, _ in points if step in series.band]
    if len(banded) > 1:
        above = [f"{scale.x(step)},{scale.y(series.band[step][1])}" for step in banded]
        below = [f"{scale.x(step)},{scale.y(series.band[step][0])}" for step in reversed(banded)]
        yield f'<polygon class="band {colour}" points="{" ".join(above + below)}"/>'
    elif banded:
        low, high = series.band[banded[0]]
        x = scale.x(banded[0])
        yield (
            f'<line class="line {colour}" x1="{x}" x2="{x}" y1="{scale.y(low)}" '
            f'y2="{scale.y(high)}"/>'
        )
    path = " ".join(f"{scale.x(step)},{scale.y(value)}" for step, value in points)
    yield f'<polyline class="line {colour}" points="{path}"/>'
    if not (series.dots or len(points) == 1):
        return
    for step, value in points:
        told = f"{value:.1%}" if percent else f"{value:.4g}"
        title = f"{escape(series.name)}, step {step:,}: {told}"
        yield (
            f'<circle class="dot {colour}" cx="{scale.x(step)}" cy="{scale.y(value)}" r="3">'
            f"<title>{title}</title></circle>"
        )
