"""The direction of a grader follows the first rule of the run that names it."""

from __future__ import annotations

import pytest

from torchprime.evaluation.directions import lower_is_better
from torchprime.evaluation.graders.make import LOWER_IS_BETTER
from torchprime.evaluation.selection import EarlyStopping, parse_rule

NAMES = ["eval_loss", "refused", "right"]
KINDS = {"refused": "refusal", "right": "exact_match"}


@pytest.mark.parametrize(
    ("gates", "ranking", "stopping", "lower"),
    [
        ([], ["eval_loss asc"], None, ["refused"]),
        ([], ["refused desc"], None, []),
        ([], ["right asc", "refused asc"], None, ["refused", "right"]),
        (["right <= 0.5"], ["eval_loss asc"], None, ["refused", "right"]),
        # Bounded on both sides: the gates say nothing.
        (["right <= 0.9", "right >= 0.5"], ["eval_loss asc"], None, ["refused"]),
        (["refused >= 0.1"], ["eval_loss asc"], None, []),
        ([], ["eval_loss asc"], EarlyStopping("right", False, 2, 0.0), ["refused", "right"]),
        # The ranking comes before early stopping, which comes before the gates.
        ([], ["right desc"], EarlyStopping("right", False, 2, 0.0), ["refused"]),
        (["right <= 1"], ["eval_loss asc"], EarlyStopping("right", True, 2, 0.0), ["refused"]),
    ],
)
def test_the_first_rule_decides(
    gates: list[str], ranking: list[str], stopping: EarlyStopping | None, lower: list[str]
) -> None:
    assert "refusal" in LOWER_IS_BETTER and "exact_match" not in LOWER_IS_BETTER
    assert lower_is_better(KINDS, parse_rule(gates, ranking, NAMES), stopping) == lower
