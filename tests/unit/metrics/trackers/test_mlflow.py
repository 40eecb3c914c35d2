"""MLflow itself: its database, and its server on loopback, read back by its own client."""

from __future__ import annotations

import json
import math
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from torchprime.metrics.record import StepRecord
from torchprime.metrics.trackers.mlflow import MLflow
from torchprime.metrics.trackers.tracker import Table, TrackedRun, scalars

mlflow = pytest.importorskip("mlflow", reason="make test-trackers installs it")

ANSWERS = Table(["output", "exact"], [["<b>né", 1.0], ["", None]])
CONFIG = {"seed": 7, "long": "x" * 9000, "model": {"pretrained_model": "a b", "none": None}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a database of its own."""
    folder = tmp_path_factory.mktemp("server")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
    command += ["--port", str(port), "--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", str(folder / "artifacts")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder)
    try:
        _wait_for(f"http://127.0.0.1:{port}/health", process)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def _wait_for(url: str, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 150
    while time.monotonic() < until:
        assert process.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError("the server does not answer")


def tracked(run: TrackedRun, record: StepRecord, report: Path) -> str:
    """Log two steps after `first_step`; return the line for the user."""
    tracker = MLflow(run)
    told = tracker.open()
    for step in (run.first_step + 1, run.first_step + 2):
        tracker.log(step, scalars(replace(record, step=step, loss=1 / step)))
    tracker.log(2, {"eval/loss": math.nan, "eval/loss/a%b": 2.0})
    tracker.table(2, ANSWERS)
    tracker.artifact([report])
    tracker.close("finished" if run.first_step else "stopped")
    return told


def check(client: Any, run_id: str, first_step: int) -> None:
    found = client.get_run(run_id)
    assert found.info.status == ("FINISHED" if first_step else "KILLED")
    assert found.info.run_name == "first"
    assert found.data.params["seed"] == "7" and found.data.params["model.none"] == "None"
    assert found.data.params["long"] == "x" * 6000
    losses = [(m.step, m.value) for m in client.get_metric_history(run_id, "train/loss")]
    assert sorted(losses) == [(step, pytest.approx(1 / step)) for step in range(1, first_step + 3)]
    assert math.isnan(found.data.metrics["eval/loss"])
    assert found.data.metrics["eval/loss/a_b"] == 2.0, "MLflow allows no % in a name"
    files = {each.path for each in client.list_artifacts(run_id)}
    assert files == {"config.yaml", "samples", "report"}
    table = Path(client.download_artifacts(run_id, "samples/step_00000002.json")).read_text()
    assert json.loads(table) == {"columns": ANSWERS.columns, "data": ANSWERS.rows}
    assert Path(client.download_artifacts(run_id, "report/report.md")).read_text() == "# report"


@pytest.mark.slow
@pytest.mark.parametrize("where", ["server", "database"])
def test_a_run_and_its_continuation(
    where: str, tmp_path: Path, step_record: StepRecord, monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    if where == "server":
        uri = request.getfixturevalue("server")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    report = tmp_path / "report.md"
    report.write_text("# report")
    run = TrackedRun("first", tmp_path / "run", CONFIG)
    client = mlflow.MlflowClient(tracking_uri=uri)
    told = tracked(run, step_record, report)
    run_id = run.remembered("mlflow")["run_id"]
    assert told == f"mlflow: run {run_id} in {uri}"
    check(client, run_id, 0)
    told = tracked(replace(run, first_step=2), step_record, report)
    assert told == f"mlflow: run {run_id} continues in {uri}"
    check(client, run_id, 2)
    experiment = client.get_experiment_by_name("torchprime")
    assert len(client.search_runs([experiment.experiment_id])) == 1


@pytest.mark.slow
def test_a_server_that_is_not_there_is_replaced_by_the_database(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    tracker = MLflow(TrackedRun("first", tmp_path / "run", {}))
    told = tracker.open()
    assert f"in sqlite:///{tmp_path}/mlflow.db instead of http://127.0.0.1:9 (" in told
    tracker.log(1, {"train/loss": 1.0})
    tracker.close("finished")
