"""The report of a run, written as report.md and report.html from the files in the run's folder."""

from __future__ import annotations

from pathlib import Path

from torchprime.errors import RuntimeSetupError
from torchprime.files.atomic import make_folder, write_text
from torchprime.files.private_folders import require_private
from torchprime.report.html_page import html
from torchprime.report.markdown import markdown
from torchprime.report.read import read_report

MARKDOWN, PAGE = "report.md", "report.html"


def write_report(run: Path, out: Path | None = None) -> list[Path]:
    """Write both files into the run's folder, or into `out`, and return their paths.

    Raises:
        UserError: what `read_report` raises, or a file cannot be written.
    """
    report = read_report(run)
    folder = run if out is None else out
    require_private(folder, "RUN" if out is None else "--out")
    texts = {folder / MARKDOWN: markdown(report), folder / PAGE: html(report)}
    try:
        make_folder(folder)
        for path, text in texts.items():
            write_text(path, text)
    except OSError as error:
        raise RuntimeSetupError(
            f"{folder}: the report cannot be written there ({error.strerror}). Make room, or name "
            "another folder: torchprime report RUN --out DIR."
        ) from error
    return list(texts)
