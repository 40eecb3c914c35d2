"""Trackers by name, and the message for a library that is not installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from torchprime.config.sections.metrics import TrackerName
from torchprime.errors import ConfigError
from torchprime.metrics.trackers import choose
from torchprime.metrics.trackers.choose import TRACKERS, require_libraries


def test_the_config_knows_the_same_names() -> None:
    assert set(TRACKERS) == set(TrackerName.__args__)


def test_a_missing_library_is_one_message_with_the_pip_line(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "_is_installed", lambda name: name == "tensorboard")
    require_libraries(["tensorboard"])
    with pytest.raises(ConfigError) as caught:
        require_libraries(["tensorboard", "wandb", "mlflow"])
    assert str(caught.value) == (
        "metrics.trackers: given [tensorboard, wandb, mlflow], but wandb and mlflow are not "
        "installed. Install with pip install 'torchprime[wandb,mlflow]', or set "
        "metrics.trackers=[tensorboard]."
    )


def test_a_folder_named_like_a_library_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """wandb leaves a folder `wandb` where it was started."""
    (tmp_path / "trackio_not_a_library").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    assert not choose._is_installed("trackio_not_a_library")
    assert choose._is_installed("tensorboard")
