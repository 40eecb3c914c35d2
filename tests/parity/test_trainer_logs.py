"""Logs of transformers' own Trainer: of every step, of means, and of a run that was resumed."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torchprime.compare.judge import compare
from torchprime.compare.logs.read import read_run
from torchprime.compare.verdict import AGREE

WORKER = Path(__file__).with_name("trainer_worker.py")
MEANS = "8"  # steps 8, 16, 24; a resume at 10 cuts the second

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None,
        reason="transformers' Trainer needs accelerate",
    ),
]


def train(out: Path, *arguments: str) -> Path:
    """Run the worker; its terminal is in `log.txt`."""
    environment = os.environ | {"USE_TORCH_XLA": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(WORKER), str(out), *arguments]
    with Path(f"{out}.txt").open("w") as log:
        subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=True)
    return out / "trainer_state.json"


def test_every_form_of_a_trainers_log_agrees_with_every_other(tmp_path: Path) -> None:
    every = read_run("every", train(tmp_path / "every", "1"))
    out = tmp_path / "means"
    runs = {"means": read_run("means", train(out, MEANS)), "text": read_run("text", f"{out}.txt")}
    resumed = train(out, MEANS, str(out / "checkpoint-10"))
    runs["resumed"] = read_run("resumed", resumed)
    assert {step: x.mean_over for step, x in every.steps.items()} == dict.fromkeys(range(1, 25), 1)
    assert {step: x.mean_over for step, x in runs["text"].steps.items()} == {8: 8, 16: 8, 24: 8}
    assert {step: x.mean_over for step, x in runs["means"].steps.items()} == {8: 8, 16: 8, 24: 8}
    assert {step: x.mean_over for step, x in runs["resumed"].steps.items()} == {8: 8, 16: 6, 24: 8}
    for run in runs.values():
        result = compare([every, run])
        assert result.verdict == AGREE, (run.label, result.pairs[0].first_beyond)
    assert compare([every, runs["resumed"]]).pairs[0].quantities["loss"].worst.relative < 1e-6
