"""The figure of a comparison: losses, their differences, and the other logged quantities.

Left, large: the losses, and below them each run's relative difference from the reference with its
band. Right: gradient norm, learning rate and throughput. Runs have the same colour in all panels (a
palette that colour-blind readers can distinguish) and are named at the ends of their lines. The
reference is drawn first, wide and grey, so that it stays visible under an equal run.

A loss that is a mean over steps is a horizontal bar over these steps. A panel names the runs that
logged no numbers for it.

The files depend only on the comparison: they have no dates, and ids in the SVG come from a fixed
salt. Only run names in scripts that DejaVu Sans lacks depend on the installed fonts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchprime.compare.captions import subtitle, title
from torchprime.compare.label_fonts import FIRST, families_for, legible, quiet_fonts
from torchprime.compare.logs.run import LoggedStep, Run
from torchprime.compare.verdict import Comparison, Pair, Point
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.files.atomic import write_bytes

# Okabe and Ito's palette, the pale colours darkened, and two more colours in between.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#7A4FA3", "#8C510A",
    "#1A1A1A",
)  # fmt: skip
STYLES = ("--", "-.", ":")  # lines after the first are dashed, so that one below shows in the gaps
MOST_RUNS = len(COLOURS) + 1
REFERENCE = "#B5B9BF"
INK, QUIET, BAND = "#22262B", "#6B727B", "#E9EDF2"
WIDTH, HEIGHT = 11, 6.6  # inches
SETTINGS: Any = {
    "svg.hashsalt": "torchprime",
    "font.family": FIRST,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#C3C8CE",
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": "#C3C8CE",
    "ytick.color": "#C3C8CE",
    "xtick.labelcolor": QUIET,
    "ytick.labelcolor": QUIET,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "axes.titlepad": 8,
    "lines.solid_capstyle": "round",
}


def draw(comparison: Comparison, stem: Path) -> list[Path]:
    """Write `stem`.png and `stem`.svg and return their paths.

    Raises:
        ConfigError: for more runs than can be told apart.
        RuntimeSetupError: if a file cannot be written.
    """
    if len(comparison.runs) > MOST_RUNS:
        raise ConfigError(
            f"--figure: {len(comparison.runs)} runs, expected at most {MOST_RUNS} that can be told "
            "apart; leave some out, or --figure none"
        )
    paths = [Path(f"{stem}.png"), Path(f"{stem}.svg")]
    with quiet_fonts():
        families, missing = families_for(run.label for run in comparison.runs)
    comparison = _relabelled(comparison, missing)
    with quiet_fonts(), matplotlib.rc_context({**SETTINGS, "font.family": families}):
        figure = _figure(comparison)
        try:
            stem.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(paths[0], _drawn(figure, "png", dpi=160, metadata={"Software": None}))
            write_bytes(paths[1], _drawn(figure, "svg", metadata={"Date": None, "Creator": None}))
        except OSError as error:
            raise RuntimeSetupError(
                f"--out, --figure: {stem} cannot be written ({error.strerror}), expected a place "
                "that can be"
            ) from error
    return paths


def _drawn(figure: Figure, kind: str, **options: Any) -> bytes:
    drawn = BytesIO()
    figure.savefig(drawn, format=kind, **options)
    return drawn.getvalue()


def _relabelled(comparison: Comparison, missing: set[str]) -> Comparison:
    """Return the comparison with run names that can be drawn."""
    if not missing:
        return comparison

    def named(run: Run) -> Run:
        return replace(run, label=legible(run.label, missing))

    pairs = tuple(replace(pair, run=named(pair.run)) for pair in comparison.pairs)
    return replace(comparison, reference=named(comparison.reference), pairs=pairs)


def _figure(comparison: Comparison) -> Figure:
    figure = Figure(figsize=(WIDTH, HEIGHT), facecolor="white")
    grid = figure.add_gridspec(
        6, 2, width_ratios=(1.75, 1), left=0.06, right=0.985, bottom=0.075, top=0.835,
        wspace=0.54, hspace=1.35,
    )  # fmt: skip
    loss = figure.add_subplot(grid[:3, 0])
    apart = figure.add_subplot(grid[3:, 0], sharex=loss)
    norm, rate, speed = (
        figure.add_subplot(grid[top : top + 2, 1], sharex=loss) for top in (0, 2, 4)
    )
    first, last = _first_step(comparison), comparison.steps[-1]
    margin = max(0.5, 0.01 * (last - first))
    loss.set_xlim(first - margin, last + margin)
    loss.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))

    _curves(loss, comparison, "loss")
    _heldout(loss, comparison)
    means = any(logged.mean_over != 1 for run in comparison.runs for logged in run.steps.values())
    loss.set_title("Loss, nats per supervised token" + ("; bars: means over steps" * means))
    _name_ends(loss, comparison.runs, "loss", last)
    _apart(apart, comparison)
    _curves(norm, comparison, "grad_norm")
    norm.set_title("Gradient norm")
    _curves(rate, comparison, "lr")
    rate.set_title("Learning rate")
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short_number(value)))
    _curves(speed, comparison, "supervised_tokens_per_s")
    speed.set_title("Supervised tokens per second")
    speed.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    if speed.lines:
        speed.set_ylim(bottom=0)
    for axes in (loss, norm, rate, speed):
        if axes.lines or axes.collections:
            axes.yaxis.set_major_locator(MaxNLocator(nbins=5 if axes is loss else 3))
    for axes in (loss, apart, norm, rate, speed):
        axes.grid(axis="y", color="#EEF0F3", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(length=3, labelsize=8)
    for axes in (apart, speed):
        axes.set_xlabel("step", fontsize=8, labelpad=2)
    _titles(figure, comparison)
    return figure


def _short_number(value: float) -> str:
    """Return a short form of the number: 5e-5 for 0.00005."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def _titles(figure: Figure, comparison: Comparison) -> None:
    headline, under = title(comparison), subtitle(comparison)
    plain: dict[str, Any] = {"va": "center", "parse_math": False}  # names may have a $
    figure.text(0.022, 0.945, headline, fontsize=14, fontweight="bold", **plain)
    figure.text(0.022, 0.903, under, fontsize=9, color=QUIET, **plain)


def _look(place: int) -> dict[str, Any]:
    """Return the line style of the run at this position; the first is the reference."""
    if place == 0:
        return {"color": REFERENCE, "linewidth": 4.5, "zorder": 2}
    style = "-" if place == 1 else STYLES[place % len(STYLES)]
    return {"color": COLOURS[place - 1], "linewidth": 1.4, "linestyle": style, "zorder": 3}


def _name_colour(place: int) -> str:
    return COLOURS[place - 1] if place else QUIET


def _first_step(comparison: Comparison) -> int:
    """Return the first step that a judged loss covers."""
    first = comparison.steps[0]
    return min(run.steps[first].window.start for run in comparison.runs)


def _within(comparison: Comparison, run: Run, name: str) -> list[tuple[LoggedStep, float]]:
    """Return the run's own numbers up to the last judged step that it logged."""
    steps = [s for s in run.steps if _first_step(comparison) <= s <= comparison.steps[-1]]
    found = [(run.steps[step], getattr(run.steps[step], name)) for step in steps]
    return [(logged, float(value)) for logged, value in found if value is not None]


def _curves(axes: Axes, comparison: Comparison, name: str) -> None:
    without, infinite = [], []
    for place, run in enumerate(comparison.runs):
        found = _within(comparison, run, name)
        if not any(math.isfinite(value) for _, value in found):
            (infinite if found else without).append(run.label)
            continue
        over = [logged.mean_over if name == "loss" else 1 for logged, _ in found]
        # A number that is not finite is NaN, which interrupts the line.
        values = [value if math.isfinite(value) else math.nan for _, value in found]
        _draw_numbers(axes, [logged.step for logged, _ in found], values, over, place)
        judged = comparison.pairs[place - 1].quantities.get(name) if place else None
        if name != "loss" and judged and (first := judged.first_beyond):
            _mark_first(axes, first, first.value, place)
    _tell_absent(axes, len(comparison.runs), without, infinite)


def _draw_numbers(
    axes: Axes,
    steps: Sequence[int],
    values: Sequence[float],
    over: Sequence[int | None],
    place: int,
) -> None:
    """Draw a line through single steps, or a bar over the steps of each mean; a dot if the number
    of its steps is unknown."""
    look = _look(place)
    if all(each == 1 for each in over):
        alone = {"marker": "o", "markersize": 3} if len(steps) == 1 else {}
        axes.plot(steps, values, **look, **alone)
        return
    bars = [(s, m, v) for s, m, v in zip(steps, over, values, strict=True) if m is not None]
    axes.hlines(
        [v for _, _, v in bars], [s - m + 0.5 for s, m, _ in bars], [s + 0.5 for s, _, _ in bars],
        colors=look["color"], linewidth=look["linewidth"], zorder=look["zorder"],
        linestyles=look.get("linestyle", "-"),
    )  # fmt: skip
    dots = [(s, v) for s, m, v in zip(steps, over, values, strict=True) if m is None]
    axes.plot(*zip(*dots, strict=True) if dots else ([], []), "o", color=look["color"], ms=3)


def _tell_absent(axes: Axes, runs: int, without: Sequence[str], infinite: Sequence[str]) -> None:
    """Write which runs have no line in this panel, and why."""
    told: list[str] = []
    for labels, why in ((without, "not logged"), (infinite, "no finite number")):
        if len(labels) == runs:
            told.append(why)
        elif labels:
            told.append(f"{why}: {', '.join(_fit(label) for label in labels)}")
    if not told:
        return
    quiet: dict[str, Any] = {"transform": axes.transAxes, "color": QUIET, "parse_math": False}
    if len(without) + len(infinite) == runs:
        axes.text(0.5, 0.5, "\n".join(told), ha="center", va="center", **quiet)
        axes.set_yticks([])
    else:
        axes.text(0.99, 0.97, "\n".join(told), ha="right", va="top", fontsize=8, **quiet)


def _heldout(axes: Axes, comparison: Comparison) -> None:
    first = True
    for place, run in enumerate(comparison.runs):
        at = [s for s in run.heldout if s <= comparison.steps[-1]]
        values = [run.heldout[step] for step in at]
        if not at:
            continue
        size = 7 if place == 0 else 4
        axes.plot(at, values, "o", color=_look(place)["color"], markersize=size, zorder=3)
        if first and math.isfinite(values[-1]):
            first = False
            axes.annotate(
                "held out", (at[-1], values[-1]), xytext=(-6, 7), textcoords="offset points",
                ha="right", fontsize=8, color=QUIET,
            )  # fmt: skip


def _apart(axes: Axes, comparison: Comparison) -> None:
    """Draw each run's relative loss difference on a log scale; equal losses lie on the bottom
    edge."""
    pairs = [pair for pair in comparison.pairs if "loss" in pair.quantities]
    points = [point for pair in pairs for point in pair.quantities["loss"].points]
    real = [p.relative for p in points if 0 < p.relative < math.inf]
    bands = [p.band for p in points if p.band is not None and p.band < math.inf]
    bottom = min([*real, *bands, 1e-7]) / 3
    top = max([*real, *bands, 1e-6]) * 6
    axes.set_yscale("log")
    axes.set_ylim(bottom, top)
    edge = "" if all(point.relative for point in points) else " (bottom edge: equal)"
    name = comparison.reference.label
    axes.set_title(f"Loss, relative difference from {name}{edge}", parse_math=False)
    if bands:
        _band(axes, pairs, bottom)
    ends = []
    for place, pair in enumerate(comparison.pairs, start=1):
        if "loss" not in pair.quantities:
            continue
        found = pair.quantities["loss"].points
        steps = [point.step for point in found]
        heights = [min(max(point.relative, bottom), top) for point in found]
        _draw_numbers(axes, steps, heights, [point.mean_over for point in found], place)
        ends.append((pair.run.label, heights[-1], place))
        if (first := pair.quantities["loss"].first_beyond) is not None:
            _mark_first(axes, first, min(max(first.relative, bottom), top), place)
    for value, told in ((0, "equal to the last bit"), (math.inf, "no finite difference")):
        if all(point.relative == value for point in points):
            axes.text(0.5, 0.4, told, transform=axes.transAxes, ha="center", color=QUIET)
    _spread_names(axes, ends, comparison.steps[-1])


def _band(axes: Axes, pairs: Sequence[Pair], bottom: float) -> None:
    widest: dict[int, float] = {}
    for pair in pairs:
        for point in pair.quantities["loss"].points:
            if point.band is not None and math.isfinite(point.band):
                widest[point.step] = max(widest.get(point.step, 0.0), point.band)
    steps = sorted(widest)
    heights = [widest[step] for step in steps]
    if len(set(heights)) == 1:
        left, right = axes.get_xlim()
        steps, heights = [left, right], heights[:1] * 2
    axes.fill_between(steps, bottom, heights, color=BAND, linewidth=0, zorder=0)
    axes.plot(steps, heights, color="#9AA3AD", linewidth=1, zorder=1)
    low, high = _short_number(min(heights)), _short_number(max(heights))
    axes.annotate(
        f"band {low}" if low == high else f"band {low} to {high}", (steps[0], max(heights)),
        xytext=(6, 4), textcoords="offset points", fontsize=8, color=QUIET,
    )  # fmt: skip


def _mark_first(axes: Axes, point: Point, height: float, place: int) -> None:
    """Draw a ring at the step where a quantity first leaves its band."""
    if not math.isfinite(height):
        return
    axes.plot(
        [point.step], [height], "o", markersize=7, markerfacecolor="white", zorder=5,
        markeredgecolor=COLOURS[place - 1], markeredgewidth=1.6, clip_on=False,
    )  # fmt: skip
    axes.annotate(
        f"step {point.step:,}", (point.step, height), xytext=(-7, 5), textcoords="offset points",
        ha="right", fontsize=8, color=COLOURS[place - 1], fontweight="bold", zorder=6,
    )  # fmt: skip


# Names --------------------------------------------------------------------------------------------


def _name_ends(axes: Axes, runs: Sequence[Run], name: str, last: int) -> None:
    """Write every run's name beside the end of its line."""
    ends = []
    for place, run in enumerate(runs):
        values = [getattr(logged, name) for step, logged in run.steps.items() if step <= last]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if known:
            ends.append((run.label, float(known[-1]), place))
    _spread_names(axes, ends, last)


def _spread_names(axes: Axes, ends: Sequence[tuple[str, float, int]], last: int) -> None:
    """Write the names right of the axes, as near to their heights as possible without overlap."""
    low, high = axes.get_ylim()
    if axes.get_yscale() == "log":
        low, high = math.log10(low), math.log10(high)
        ends = [(label, math.log10(value), place) for label, value, place in ends]
    box = axes.get_position()
    points = box.height * HEIGHT * 72
    gap = min(11.5 / points, 1 / max(len(ends), 1))
    # The first of equal heights is on top.
    ordered = sorted(ends, key=lambda end: (end[1], -end[2]))
    wanted = [min(max((value - low) / (high - low), 0.0), 1.0) for _, value, _ in ordered]
    for (label, _, place), here, there in zip(ordered, wanted, spread(wanted, gap), strict=True):
        axes.annotate(
            _fit(label), (last, here), xycoords=("data", "axes fraction"),
            xytext=(1.045, there), textcoords="axes fraction", va="center", fontsize=8,
            color=_name_colour(place), annotation_clip=False, parse_math=False,
            arrowprops={
                "arrowstyle": "-", "color": _look(place)["color"], "linewidth": 0.7,
                "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5),
            },
        )  # fmt: skip


def _fit(label: str, most: int = 26) -> str:
    return label if len(label) <= most else label[: most - 1] + "…"


def spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Return positions in [0, 1] at least `gap` apart, in the order of `wanted` (ascending), and
    near to it."""
    places: list[float] = []
    for height in wanted:
        places.append(max(height, places[-1] + gap) if places else height)
    # A group that was moved upwards is centred again on the positions it labels.
    ceiling = 1.0
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    shift = sum(p - w for p, w in zip(places, wanted, strict=True)) / max(len(places), 1)
    if places and places[0] - shift >= 0 and places[-1] - shift <= 1:
        places = [place - shift for place in places]
    return places
