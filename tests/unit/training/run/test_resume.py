"""config.yaml tells if a run wrote checkpoints; an unreadable one is refused by name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from torchprime.errors import RuntimeSetupError
from torchprime.training.run import folder as run_folder
from torchprime.training.run.resume import died_early

PLAIN = {
    "checkpoint": {"every_steps": None, "every_minutes": None},
    "export": {"which": "last"},
}


@pytest.mark.parametrize(
    ("changes", "wrote"),
    [
        ({}, False),
        ({"checkpoint": {"every_steps": 5, "every_minutes": None}}, True),
        ({"checkpoint": {"every_steps": None, "every_minutes": 1.5}}, True),
        ({"export": {"which": "best"}}, True),
        ({"checkpoint": None}, False),
    ],
)
def test_the_config_says_if_a_run_writes_checkpoints(
    tmp_path: Path, changes: dict, wrote: bool
) -> None:
    assert not died_early(tmp_path)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(PLAIN | changes))
    assert died_early(tmp_path) == wrote


def test_a_pipe_in_place_of_the_config_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(RuntimeSetupError, match="config.yaml cannot be read: .*not a regular file"):
        died_early(tmp_path)


def test_a_config_that_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "MOST_BYTES", 100)
    (tmp_path / "config.yaml").write_text("# " + "x" * 100)
    with pytest.raises(RuntimeSetupError, match="config.yaml cannot be read: .*more than 100"):
        died_early(tmp_path)
