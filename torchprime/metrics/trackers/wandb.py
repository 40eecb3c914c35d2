"""Weights & Biases: online with a login, else files in `trackers/` in the run's folder.

The library's own environment variables hold: WANDB_API_KEY, WANDB_ENTITY, WANDB_BASE_URL,
WANDB_MODE. Of this machine it gets the library's usual facts (host, hardware, packages), but no
code, no git state and nothing that is printed.
"""

from __future__ import annotations

import netrc
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from torchprime.metrics.trackers.tracker import Outcome, Table, TrackedRun, library

EXIT_CODES: dict[Outcome, int] = {"finished": 0, "failed": 1, "stopped": 75}


class Wandb:
    """Tracker of wandb. A point's place on the x-axis is its step, also after a resume."""

    name = "wandb"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._folder = run.own_folder()

    def open(self) -> str:
        """Start or continue the run; without login or network, offline."""
        wandb = library("wandb")
        settings = wandb.setup().settings
        asked = self._run.offline or settings.mode in ("offline", "dryrun")
        why = "as asked" if asked else None if _has_login(settings) else "no login; wandb login"
        if settings.mode == "disabled":
            why = None
        try:
            self._wandb = self._init(wandb, "offline" if why else settings.mode or "online")
        except Exception as error:  # of any class; the run's files are then sent later
            if why:
                raise
            why = f"{type(error).__name__}: {error}"
            self._wandb = self._init(wandb, "offline")
        self._wandb.define_metric("step", hidden=True)
        self._wandb.define_metric("*", step_metric="step")
        self._run.remember(self.name, {"id": self._wandb.id, "entity": self._wandb.entity or None})
        if why is None:
            return f"wandb: {self._wandb.url or settings.mode}"
        folder = Path(self._wandb.dir).parent
        return f"wandb: offline ({why}). To send it: wandb sync {folder}"

    def _init(self, wandb: Any, mode: str) -> Any:
        known = self._run.remembered(self.name)
        return wandb.init(
            mode=mode,
            project=self._run.project,
            entity=known.get("entity"),
            name=self._run.name,
            id=known.get("id") or uuid.uuid4().hex[:12],
            resume="allow",
            dir=str(self._folder),
            config=dict(self._run.config),
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                finish_timeout=self._run.finish_seconds,
            ),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log one row of values."""
        self._wandb.log({**values, "step": step})

    def table(self, step: int, table: Table) -> None:
        """Log the answers as a table."""
        rows = [list(row) for row in table.rows]
        shown = library("wandb").Table(columns=table.columns, data=rows, allow_mixed_types=True)
        self._wandb.log({"samples": shown, "step": step})

    def artifact(self, files: Sequence[Path]) -> None:
        """Log the files as one artifact of the run."""
        artifact = library("wandb").Artifact(f"run-{self._wandb.id}-report", type="report")
        for path in files:
            artifact.add_file(str(path), name=path.name)
        self._wandb.log_artifact(artifact)

    def close(self, outcome: Outcome) -> None:
        """Send the rest and mark the run with its outcome."""
        self._wandb.finish(exit_code=EXIT_CODES[outcome])


def _has_login(settings: Any) -> bool:
    """Return True if an API key is in the environment, in wandb's settings or in netrc."""
    if settings.api_key or settings.identity_token_file or os.environ.get("WANDB_API_KEY"):
        return True
    host = urlsplit(settings.base_url).hostname or ""
    with suppress(OSError, netrc.NetrcParseError):
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    return False
