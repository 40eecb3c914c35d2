"""The writer of report.html: a run's report as one page that loads nothing
(torchprime/data/page.py)."""

from __future__ import annotations

from markupsafe import Markup

from torchprime.data.page import render_page
from torchprime.report.answers import grade, shorten
from torchprime.report.curves import Chart, charts, svg
from torchprime.report.read import RunReport


def html(report: RunReport) -> str:
    """Return the page's HTML."""
    drawn = charts(report.steps, report.evaluations, report.history, report.lower)

    def curve(chart: Chart) -> Markup:
        return svg(chart, report.last_step, report.best)

    return render_page("report", at=report, charts=drawn, svg=curve, shorten=shorten, grade=grade)
