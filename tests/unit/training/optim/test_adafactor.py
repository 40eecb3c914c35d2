"""Adafactor against transformers'."""

from __future__ import annotations

from transformers.optimization import Adafactor as HFAdafactor
from updates import LR, ours, same, small_model, theirs

from torchprime.training.optim.adafactor import Adafactor


def test_adafactor_is_transformers() -> None:
    weights, gradients = small_model()
    given = {"relative_step": False, "scale_parameter": False, "warmup_init": False}
    expected = theirs(lambda groups: HFAdafactor(groups, lr=LR, **given), weights, gradients)
    same(ours(Adafactor(weight_decay=0.1), weights, gradients), expected, weights)
