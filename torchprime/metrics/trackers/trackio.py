"""Trackio: the Space of TRACKIO_SPACE_ID, else the library's local store (`trackio show`)."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from huggingface_hub import get_token

from torchprime.metrics.trackers.tracker import Outcome, Table, TrackedRun, library
from torchprime.text.markdown_text import inline

SPACE, SERVER = "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"


class Trackio:
    """Tracker of trackio, which knows a run by its name: it gets a random suffix."""

    name = "trackio"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._folder = run.own_folder()

    def open(self) -> str:
        """Start or continue the run; without login, in the local store."""
        space, note = os.environ.get(SPACE), ""
        if space and not self._run.offline and get_token() is None:
            note = f" instead of {space} (no login; hf auth login)"
        if note or self._run.offline:  # the library reads them itself
            os.environ.pop(SPACE, None)
            os.environ.pop(SERVER, None)
        known = self._run.remembered(self.name)
        name = known.get("run") or f"{self._run.name}-{uuid.uuid4().hex[:6]}"
        with redirect_stdout(StringIO()):  # it prints what the line below says
            self._trackio = library("trackio").init(
                project=self._run.project,
                name=name,
                resume="allow",
                config=dict(self._run.config),
                embed=False,
            )
        self._run.remember(self.name, {"run": name})
        where = os.environ.get(SPACE) or os.environ.get(SERVER) or "the local store"
        return f"trackio: {name} in {where}{note}; to look: trackio show"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of a step."""
        self._trackio.log(dict(values), step=step)

    def table(self, step: int, table: Table) -> None:
        """Log the answers as a table; trackio reads texts as Markdown, so they are escaped."""
        rows = [[inline(cell) if isinstance(cell, str) else cell for cell in r] for r in table.rows]
        shown = library("trackio").Table(columns=table.columns, data=rows)
        self._trackio.log({"samples": shown}, step=step)

    def artifact(self, files: Sequence[Path]) -> None:
        """Log the files as one artifact of the run."""
        artifact = library("trackio").Artifact(f"{self._trackio.name}-report", type="report")
        for path in files:
            artifact.add_file(path, name=path.name)
        self._trackio.log_artifact(artifact)

    def close(self, outcome: Outcome) -> None:
        """Write the outcome and the rest."""
        self._trackio.log({"outcome": outcome})
        with redirect_stdout(StringIO()):
            self._trackio.finish()
