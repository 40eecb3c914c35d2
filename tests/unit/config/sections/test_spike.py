"""Settings of the watch for spikes that make no sense."""

from __future__ import annotations

import pytest

from torchprime.config.sections.spike import SpikeConfig
from torchprime.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"window": 1}, "task.spike.window: given 1, expected at least 2"),
        ({"window": 9, "deviations": 0.0}, "task.spike.deviations: given 0.0"),
        ({"action": "skip"}, "task.spike.window: given null"),
    ],
)
def test_refused(given: dict, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        SpikeConfig(**given)
    assert str(error.value).startswith(told)


def test_off_by_default() -> None:
    assert SpikeConfig().window is None
