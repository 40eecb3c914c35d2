"""Muon against torch's, in the types in which it iterates."""

from __future__ import annotations

import pytest
import torch
from updates import LR, matrices, ours, same, small_model, theirs

from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.muon import Muon, MuonSettings, orthogonalized
from torchprime.training.optim.optimizer import Parameter


def in_torch(adjust_lr: str, nesterov: bool):
    def make(groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.Muon(groups, lr=LR, nesterov=nesterov, adjust_lr_fn=adjust_lr)

    return make


def case() -> tuple[dict, list[dict]]:
    weights, gradients = small_model()
    names = matrices(weights)
    assert len(names) == 7
    return {n: weights[n] for n in names}, [{n: g[n] for n in names} for g in gradients]


@pytest.mark.parametrize(
    ("adjust_lr", "nesterov"), [("original", True), ("match_rms_adamw", False)], ids=str
)
def test_matrices_move_as_in_torch(
    adjust_lr, nesterov: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's iterations are in bf16, ours in the weights' type; both are compared. In bf16 a value
    in the middle of two may be rounded to the other one."""
    weights, gradients = case()
    optimizer = Muon(
        AdamW(), MuonSettings(adjust_lr), momentum=0.95, nesterov=nesterov, weight_decay=0.1
    )
    expected = theirs(in_torch(adjust_lr, nesterov), weights, gradients)
    same(ours(optimizer, weights, gradients, dtype=torch.bfloat16), expected, weights, 2**-8)
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda self: self.clone())
    expected = theirs(in_torch(adjust_lr, nesterov), weights, gradients)
    monkeypatch.undo()
    same(ours(optimizer, weights, gradients), expected, weights)


def test_everything_else_moves_as_in_adamw() -> None:
    weights, gradients = small_model()
    optimizer = Muon(AdamW((0.9, 0.95), weight_decay=0.1), MuonSettings(others_lr=0.5))
    found = ours(optimizer, weights, gradients)
    expected = ours(AdamW((0.9, 0.95), weight_decay=0.1), weights, gradients, LR / 2)
    others = weights.keys() - set(matrices(weights))
    assert "lm_head.weight" in others and "model.embed_tokens.weight" in others
    for name in others:
        assert torch.equal(found[name], expected[name]), name
    hidden = Parameter(("model.layers.0.mlp.up_proj.weight",), (4, 2), torch.float32)
    assert optimizer.slots(hidden).keys() == {"momentum_buffer"}


def test_layers_of_a_stack_are_orthogonalized_one_by_one() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 10, 6)
    together = orthogonalized(stack, 5)
    for layer, found in zip(stack, together, strict=True):
        torch.testing.assert_close(found, orthogonalized(layer, 5))
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.5 and values.max() < 1.3
