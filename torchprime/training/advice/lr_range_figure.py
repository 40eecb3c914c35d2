"""The figure of a learning-rate range test: loss against rate, with the suggested interval."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from torchprime.compare.draw import BAND, COLOURS, INK, QUIET, SETTINGS
from torchprime.files.atomic import write_bytes
from torchprime.training.advice.lr_range import LrRange


def draw_range(found: LrRange, path: Path) -> None:
    """Write the figure as PNG; equal results give equal files."""
    with matplotlib.rc_context(SETTINGS):
        figure = Figure(figsize=(7, 4), facecolor="white", layout="constrained")
        axes = figure.add_subplot()
        axes.set_xscale("log")
        axes.axvspan(found.low, found.high, color=BAND)
        axes.plot(found.rates, found.losses, color=QUIET, alpha=0.35, linewidth=0.8)
        axes.plot(found.rates, found.smoothed, color=COLOURS[0], linewidth=1.8)
        top = max(found.smoothed[0], found.smoothed[-1] if found.diverged is None else 0.0)
        span = top - min(found.smoothed)
        axes.set_ylim(min(found.smoothed) - 0.1 * span, top + 0.4 * span)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("loss")
        axes.set_title(f"Try first: {found.low:.1e} to {found.high:.1e}", color=INK)
        drawn = BytesIO()
        figure.savefig(drawn, format="png", dpi=150, metadata={"Software": None})
    write_bytes(path, drawn.getvalue())
