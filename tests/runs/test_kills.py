"""A kill at any moment costs what was being written and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

STORM = Path(__file__).with_name("kill_storm.py")


@pytest.mark.parametrize("kills", [15, pytest.param(500, marks=pytest.mark.slow)])
def test_nothing_written_is_ever_lost(tmp_path: Path, kills: int) -> None:
    done = subprocess.run(
        [sys.executable, str(STORM), str(tmp_path), str(kills)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["kills"] == kills
    assert report["halves"] > kills // 10, "hardly any kill came while something was written"
    assert report["grew"] > kills // 10, "hardly any checkpoint was finished between kills"
