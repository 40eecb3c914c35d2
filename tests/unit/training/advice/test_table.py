"""The table of devices and values: whole, with a source for each value, and read as meant."""

from __future__ import annotations

import math

import pytest

from torchprime.config.topologies import CHIPS, GIB
from torchprime.training.advice.table import devices_named, first_fit, table


def test_every_list_ends_without_a_limit_and_every_value_has_a_source() -> None:
    found = table()
    lists = [
        (found["learning_rate"]["all weights"], "up_to_parameters"),
        (found["learning_rate"]["adapter"], "up_to_parameters"),
        (found["passes"], "up_to_rows"),
    ]
    for entries, limit in lists:
        limits = [entry[limit] for entry in entries]
        assert limits == sorted(limits) and math.isinf(limits[-1])
        assert all(entry["reason"] and entry["source"] for entry in entries)


@pytest.mark.parametrize(
    ("parameters", "rate"), [(1e6, 1e-3), (1e8, 1e-3), (8.03e9, 1e-5), (70e9, 5e-6)]
)
def test_the_first_entry_that_fits_is_used(parameters: float, rate: float) -> None:
    entries = table()["learning_rate"]["all weights"]
    assert first_fit(entries, "up_to_parameters", parameters).value == rate


def test_names_of_devices() -> None:
    eight = devices_named("H100-80GB:8")
    assert (eight.kind, eight.count, eight.memory) == ("gpu", 8, int(79.1 * GIB))
    assert eight.room < eight.memory
    slice_ = devices_named("v5litepod-8")
    assert (slice_.kind, slice_.count) == ("tpu", 8)
    assert slice_.memory == CHIPS["v5e"].hbm_bytes
