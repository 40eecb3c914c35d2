"""The training loss that an evaluation is compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest

from torchprime.metrics.record import StepRecord
from torchprime.training.hooks.evaluation import cross_entropy_of


@pytest.mark.parametrize(
    ("terms", "expected"),
    [
        (None, 3.0),
        ({"ewc": 0.5, "kl": 0.25}, 2.25),
        ({"l2_sp": 1.0}, 2.0),
        ({"cross_entropy": 1.5, "z_loss": 1.0, "kl": 0.5}, 1.5),
    ],
)
def test_it_is_the_part_that_held_out_loss_has_too(
    terms: dict[str, float] | None, expected: float, step_record: StepRecord
) -> None:
    assert cross_entropy_of(replace(step_record, loss=3.0, terms=terms)) == expected
