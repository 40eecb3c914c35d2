"""A comparison as a figure: what was compared, how far apart, and what else was logged.

Left, large: the losses, and below them each run's relative difference from the reference with its
band. Right: gradient norm, learning rate and throughput. Runs keep their colour everywhere (a
palette that colour-blind readers can tell apart) and are named at the ends of their lines. The
reference is drawn first, wide and grey, so that a run that lies on it is seen lying on it.

The files depend on nothing but the comparison: no dates, and ids in the SVG from a fixed salt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from torchprime.atomic import write_bytes
from torchprime.errors import ConfigError, RuntimeSetupError
from torchprime.metrics.compare import AGREE, DIFFER, Comparison, Pair, Point
from torchprime.metrics.read_logs import Run

# Okabe and Ito's, darkened where they are faint on white, and two more in between.
COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#B8860B", "#7A4FA3", "#8C510A",
    "#1A1A1A",
)  # fmt: skip
STYLES = ("--", "-.", ":")  # after the first run: what lies below shows in the gaps
WORDS = {
    "loss": "loss",
    "eval_loss": "held-out loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
}
MOST_RUNS = len(COLOURS) + 1
REFERENCE = "#B5B9BF"
INK, QUIET, BAND = "#22262B", "#6B727B", "#E9EDF2"
WIDTH, HEIGHT = 11, 6.6  # inches
SETTINGS: Any = {
    "svg.hashsalt": "torchprime",
    "font.family": "DejaVu Sans",  # comes with matplotlib
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
    """Write `stem`.png and `stem`.svg; their paths.

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
    with matplotlib.rc_context(SETTINGS):
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
    first, last = comparison.steps[0], comparison.steps[-1]
    margin = max(0.5, 0.01 * (last - first))
    loss.set_xlim(first - margin, last + margin)
    loss.xaxis.set_major_locator(MaxNLocator(nbins=7, integer=True, steps=[1, 2, 5, 10]))

    _curves(loss, comparison, "loss")
    _heldout(loss, comparison)
    loss.set_title("Loss, nats per supervised token")
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
    """5e-5 for 0.00005."""
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}" if value else "0"


def _titles(figure: Figure, comparison: Comparison) -> None:
    headline, under = title(comparison), subtitle(comparison)
    plain: dict[str, Any] = {"va": "center", "parse_math": False}  # names may have a $
    figure.text(0.022, 0.945, headline, fontsize=14, fontweight="bold", **plain)
    figure.text(0.022, 0.903, under, fontsize=9, color=QUIET, **plain)


def title(comparison: Comparison) -> str:
    """The verdict, in words that a reader of the figure alone understands."""
    reference, count = comparison.reference.label, len(comparison.steps)
    steps = f"{count:,} step" + "s" * (count != 1)
    if comparison.verdict == AGREE:
        others = [pair.run.label for pair in comparison.pairs]
        who = f"{others[0]} agrees" if len(others) == 1 else f"{len(others)} runs agree"
        return f"{who} with {reference} over {steps}"
    out = [pair for pair in comparison.pairs if pair.verdict == DIFFER]
    if not out:
        return f"Not judged: the noise of {reference} and the others is not measured"
    if len(out) > 1:
        return f"{len(out)} of {len(comparison.pairs)} runs differ from {reference}"
    found = out[0].first_beyond
    assert found is not None
    what = WORDS[found[0]]
    return f"{out[0].run.label} differs from {reference}: {what}, first at step {found[1].step:,}"


def subtitle(comparison: Comparison) -> str:
    """The largest difference of each quantity, with its band."""
    told = []
    for name, words in WORDS.items():
        found = [pair.quantities[name] for pair in comparison.pairs if name in pair.quantities]
        if not found:
            continue
        point = max((each.worst for each in found), key=lambda point: point.relative)
        if name == "lr" and not point.relative:
            continue
        amount = f"{point.relative:.1e}" if math.isfinite(point.relative) else "not finite"
        band = "no band" if point.band is None else f"band {point.band:.0e}"
        told.append(f"{words} {amount if point.relative else '0'} ({band})")
    unknown = [pair.run.label for pair in comparison.pairs if not pair.data.same]
    of_whom = unknown[0] if len(unknown) == 1 else f"{len(unknown)} runs"
    data = f"no hashes of {of_whom}" if unknown else "same batches by their hashes"
    return f"Largest relative difference: {', '.join(told)}; {data}"


def _look(place: int) -> dict[str, Any]:
    """How the run at this place is drawn; the reference is the first."""
    if place == 0:
        return {"color": REFERENCE, "linewidth": 4.5, "zorder": 2}
    style = "-" if place == 1 else STYLES[place % len(STYLES)]
    return {"color": COLOURS[place - 1], "linewidth": 1.4, "linestyle": style, "zorder": 3}


def _name_colour(place: int) -> str:
    return COLOURS[place - 1] if place else QUIET


def _within(comparison: Comparison, run: Run, name: str) -> tuple[list[int], list[float]]:
    """The run's own numbers up to the last judged step; NaN, which is not drawn, if none."""
    steps = [s for s in run.steps if comparison.steps[0] <= s <= comparison.steps[-1]]
    values = [getattr(run.steps[step], name) for step in steps]
    return steps, [
        float(value) if value is not None and math.isfinite(value) else math.nan for value in values
    ]


def _curves(axes: Axes, comparison: Comparison, name: str) -> None:
    drawn = False
    for place, run in enumerate(comparison.runs):
        steps, values = _within(comparison, run, name)
        if all(map(math.isnan, values)):
            continue
        drawn = True
        alone = {"marker": "o", "markersize": 3} if len(steps) == 1 else {}
        axes.plot(steps, values, **_look(place), **alone)
        judged = comparison.pairs[place - 1].quantities.get(name) if place else None
        if name != "loss" and judged and (first := judged.first_beyond):
            _mark_first(axes, first, first.value, place)
    if not drawn:
        axes.text(0.5, 0.5, "not logged", transform=axes.transAxes, ha="center", color=QUIET)
        axes.set_yticks([])


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
    """Each run's relative loss difference, on a log scale; equal losses lie on the bottom edge."""
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
        few = {"marker": "o", "markersize": 3} if len(steps) == 1 else {}
        axes.plot(steps, heights, **_look(place), **few)
        ends.append((pair.run.label, heights[-1], place))
        if (first := pair.quantities["loss"].first_beyond) is not None:
            _mark_first(axes, first, min(max(first.relative, bottom), top), place)
    if not real and all(point.relative == 0 for point in points):
        axes.text(
            0.5, 0.4, "equal to the last bit", transform=axes.transAxes, ha="center", color=QUIET
        )
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
    """A ring where a quantity first leaves its band."""
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
    """Every run's name beside the end of its line."""
    ends = []
    for place, run in enumerate(runs):
        values = [getattr(logged, name) for step, logged in run.steps.items() if step <= last]
        known = [value for value in values if value is not None and math.isfinite(value)]
        if known:
            ends.append((run.label, float(known[-1]), place))
    _spread_names(axes, ends, last)


def _spread_names(axes: Axes, ends: Sequence[tuple[str, float, int]], last: int) -> None:
    """Names right of the axes, as near to their heights as they fit without overlapping."""
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
    """Places in [0, 1] at least `gap` apart, in the order of `wanted` (ascending), near to it."""
    places: list[float] = []
    for height in wanted:
        places.append(max(height, places[-1] + gap) if places else height)
    # A pile that grew upwards is moved down to lie around what it names.
    ceiling = 1.0
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], ceiling)
        ceiling = places[i] - gap
    shift = sum(p - w for p, w in zip(places, wanted, strict=True)) / max(len(places), 1)
    if places and places[0] - shift >= 0 and places[-1] - shift <= 1:
        places = [place - shift for place in places]
    return places
