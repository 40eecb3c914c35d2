"""SGD against torch's."""

from __future__ import annotations

import pytest
import torch
from updates import LR, ours, same, small_model, theirs

from torchprime.training.optim.sgd import Sgd


@pytest.mark.parametrize(
    ("momentum", "nesterov"), [(0.9, False), (0.9, True), (0.0, False)], ids=str
)
def test_sgd_is_torchs(momentum: float, nesterov: bool) -> None:
    weights, gradients = small_model()
    expected = theirs(
        lambda groups: torch.optim.SGD(groups, lr=LR, momentum=momentum, nesterov=nesterov),
        weights,
        gradients,
    )
    same(ours(Sgd(momentum, nesterov, 0.1), weights, gradients), expected, weights)
