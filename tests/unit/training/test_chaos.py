"""Runs that are killed at random moments, in processes of their own, end as if nothing happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    ("backend", "kills"),
    [
        ("native", 8),
        pytest.param("native", 100, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
        pytest.param("xla", 12, marks=[pytest.mark.slow, pytest.mark.timeout(1800)]),
    ],
)
def test_a_killed_run_is_the_run_that_nothing_killed(
    backend: str, kills: int, repo_dir: Path, tmp_path: Path
) -> None:
    command = [sys.executable, str(repo_dir / "experimental" / "chaos" / "run.py")]
    command += ["--backend", backend, "--kills", str(kills), "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == sum(report["phases"].values()) == kills
    assert report["runs"] >= 1, "no run was brought to its end"
    hit = [phase for phase, count in report["phases"].items() if count]
    assert len(hit) >= (5 if kills >= 100 else 3), report["phases"]
