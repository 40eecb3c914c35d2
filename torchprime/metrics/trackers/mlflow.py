"""MLflow: the server of MLFLOW_TRACKING_URI, else a database in `output_dir`.

The runs of an `output_dir` share one database, so MLflow's page compares them:
`mlflow ui --backend-store-uri sqlite:///outputs/mlflow.db`.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchprime.metrics.trackers.tracker import Outcome, Table, TrackedRun, flat, library

STATUSES: dict[Outcome, str] = {"finished": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
MOST_PARAMETERS = 100  # in one request
LONGEST = 6000  # characters of a parameter
FORBIDDEN = re.compile(r"[^\w\-. :/]")  # in the name of a metric
URI = "MLFLOW_TRACKING_URI"
# Waiting for a server that is not there; the library's own values are 120 s, 7 times.
PATIENCE = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2"}


class MLflow:
    """Tracker of MLflow, by its client: the library's global run is left alone."""

    name = "mlflow"

    def __init__(self, run: TrackedRun) -> None:
        self._run = run
        self._folder = run.own_folder()

    def open(self) -> str:
        """Start or continue the run; a new one goes to the database if the server refuses it."""
        for name, value in PATIENCE.items():
            os.environ.setdefault(name, value)
        known = self._run.remembered(self.name)
        if known:
            self._client, self._id = self._connect(known["uri"]), known["run_id"]
            self._client.update_run(self._id, status="RUNNING")
            return f"mlflow: run {self._id} continues in {known['uri']}"
        server = None if self._run.offline else os.environ.get(URI)
        told = ""
        try:
            uri = self._start(server or self._database())
        except Exception as error:  # of any class; not reached, or no login
            if server is None:
                raise
            told = f" instead of {server} ({' '.join(str(error).split())[:200]})"
            uri = self._start(self._database())
        return f"mlflow: run {self._id} in {uri}{told}"

    def _connect(self, uri: str) -> Any:
        client = library("mlflow").MlflowClient
        logging.getLogger("mlflow").setLevel(logging.WARNING)  # it tells each table that it creates
        return client(tracking_uri=uri)

    def _database(self) -> str:
        return f"sqlite:///{self._run.folder.absolute().parent / 'mlflow.db'}"

    def _start(self, uri: str) -> str:
        run = self._run
        self._client = self._connect(uri)
        local = uri == self._database()
        self._id = self._client.create_run(self._experiment(local), run_name=run.name).info.run_id
        run.remember(self.name, {"uri": uri, "run_id": self._id})
        self._client.log_dict(self._id, dict(run.config), "config.yaml")
        self._log_parameters()
        return uri

    def _experiment(self, local: bool) -> str:
        name = self._run.project
        if (found := self._client.get_experiment_by_name(name)) is not None:
            return found.experiment_id
        place = (self._run.folder.absolute().parent / "mlartifacts").as_uri() if local else None
        return self._client.create_experiment(name, artifact_location=place)

    def _log_parameters(self) -> None:
        make = library("mlflow.entities").Param
        values = flat(self._run.config).items()
        found = [make(FORBIDDEN.sub("_", key), str(value)[:LONGEST]) for key, value in values]
        for first in range(0, len(found), MOST_PARAMETERS):
            self._client.log_batch(self._id, params=found[first : first + MOST_PARAMETERS])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values in one request."""
        make = library("mlflow.entities").Metric
        now = int(time.time() * 1000)
        found = [make(FORBIDDEN.sub("_", key), v, now, step) for key, v in values.items()]
        self._client.log_batch(self._id, metrics=found)

    def table(self, step: int, table: Table) -> None:
        """Log the answers as a table of their step, once."""
        file = f"samples/step_{step:08d}.json"
        if file in [each.path for each in self._client.list_artifacts(self._id, "samples")]:
            return  # of an earlier start; the library would append to it
        columns: dict[str, Any] = {
            name: [row[place] for row in table.rows] for place, name in enumerate(table.columns)
        }
        self._client.log_table(self._id, data=columns, artifact_file=file)

    def artifact(self, files: Sequence[Path]) -> None:
        """Log the files."""
        for path in files:
            self._client.log_artifact(self._id, str(path), "report")

    def close(self, outcome: Outcome) -> None:
        """Mark the run with its outcome."""
        self._client.set_terminated(self._id, STATUSES[outcome])
