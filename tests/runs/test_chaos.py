"""Runs that are killed at random moments, or lose a rank, a cable or a host, end as if nothing had
happened. All of them are processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run_chaos(repo_dir: Path, script: str, folder: Path, *arguments: str) -> dict[str, Any]:
    """The report of a script in experimental/chaos, which must not fail."""
    command = [sys.executable, str(repo_dir / "experimental" / "chaos" / script)]
    command += ["--folder", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


SLOW = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.mark.parametrize(
    ("backend", "kills", "options"),
    [
        ("native", 3, ()),
        pytest.param("native", 8, (), marks=SLOW),
        pytest.param("native", 100, (), marks=SLOW),
        pytest.param("native", 20, ("--adapter", "dora"), marks=SLOW),
        pytest.param("xla", 12, (), marks=SLOW),
    ],
)
def test_a_killed_run_is_the_run_that_nothing_killed(
    backend: str, kills: int, options: tuple[str, ...], repo_dir: Path, tmp_path: Path
) -> None:
    given = ("--backend", backend, "--kills", str(kills), *options)
    report = run_chaos(repo_dir, "run.py", tmp_path, *given)
    assert report["kills"] == sum(report["phases"].values()) == kills
    assert report["runs"] >= 1, "no run was brought to its end"
    hit = [phase for phase, count in report["phases"].items() if count]
    if kills >= 8:
        assert len(hit) >= (5 if kills >= 100 else 3), report["phases"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("fate", ["killed", "stopped", "partitioned"])
def test_a_rank_that_lost_its_partner_says_so_and_both_go_on(
    fate: str, repo_dir: Path, tmp_path: Path
) -> None:
    report = run_chaos(repo_dir, "ranks.py", tmp_path, "--few", "--fates", fate)
    if fate in report["left_out"]:
        pytest.skip(report["left_out"][fate])
    assert {case["phase"] for case in report["cases"]} >= {
        "step", "checkpoint", "evaluation", "export"
    }  # fmt: skip
    assert {case["rank"] for case in report["cases"]} == {0, 1}


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_hosts_survive_a_cut_cable_and_each_others_death(
    repo_dir: Path, tmp_path: Path
) -> None:
    report = run_chaos(repo_dir, "hosts.py", tmp_path)
    if "skipped" in report:
        pytest.skip(report["skipped"])
    happened = [case["case"] for case in report["cases"]]
    assert happened == ["blink", "cut", "host 1 dies", "host 0 dies", "no interface"]
