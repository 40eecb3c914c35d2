"""TensorBoard: event files in `tensorboard/` in the run's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from torchprime.files.private_folders import own_folder
from torchprime.metrics.trackers.tracker import Outcome, Table, TrackedRun
from torchprime.text import markdown_text

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """Tracker that writes scalars by tag, config and answers as texts. It keeps no files.

    Points of an earlier start after `first_step` are not shown.
    """

    name = "tensorboard"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._folder = own_folder(run.folder, "tensorboard", "output_dir")

    def open(self) -> None:
        """Open a new event file."""
        # late: takes a second, and only this tracker needs it
        from torch.utils.tensorboard import SummaryWriter

        first = self._run.first_step
        purged = first + 1 if first else None
        self._summary: SummaryWriter = SummaryWriter(str(self._folder), purge_step=purged)
        text = json.dumps(self._run.config, indent=2, ensure_ascii=False)
        self._summary.add_text("config", "\n".join(markdown_text.block(text, "json")), first)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Write one point per tag."""
        for tag, value in values.items():
            self._summary.add_scalar(tag, value, step)

    def table(self, step: int, table: Table) -> None:
        """Write the answers as a Markdown table."""
        rows = [["" if cell is None else str(cell) for cell in row] for row in table.rows]
        lines = markdown_text.table(table.columns, rows)
        self._summary.add_text("samples", "\n".join(lines), step)

    def artifact(self, files: Sequence[Path]) -> None:
        """Do nothing: the event files are in the run's folder, beside these files."""

    def close(self, outcome: Outcome) -> None:
        """Flush and close the event file."""
        self._summary.close()
