"""Muon against torch's, with iterations in fp32 and in bf16."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from updates import LR, matrices, ours, same, small_model, theirs

from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.muon import AdjustLr, Muon, MuonSettings, orthogonalized
from torchprime.training.optim.optimizer import Parameter


def in_torch(adjust_lr: AdjustLr, nesterov: bool):
    def make(groups: list[dict]) -> torch.optim.Optimizer:
        return torch.optim.Muon(groups, lr=LR, nesterov=nesterov, adjust_lr_fn=adjust_lr)

    return make


def case() -> tuple[dict, list[dict]]:
    weights, gradients = small_model()
    names = matrices(weights)
    assert len(names) == 7
    return {n: weights[n] for n in names}, [{n: g[n] for n in names} for g in gradients]


BOTH = pytest.mark.parametrize(
    ("adjust_lr", "nesterov"), [("original", True), ("match_rms_adamw", False)], ids=str
)


def muon(adjust_lr: AdjustLr, nesterov: bool) -> Muon:
    settings = MuonSettings(adjust_lr)
    return Muon(AdamW(), settings, momentum=0.95, nesterov=nesterov, weight_decay=0.1)


@contextmanager
def torch_iterates_in(dtype: torch.dtype) -> Iterator[None]:
    """torch's iterations are in bf16, whatever the weights' type is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "bfloat16", lambda self: self.to(dtype, copy=True))
        yield


@BOTH
def test_matrices_move_as_in_torch(adjust_lr: AdjustLr, nesterov: bool) -> None:
    weights, gradients = case()
    with torch_iterates_in(torch.float32):
        expected = theirs(in_torch(adjust_lr, nesterov), weights, gradients)
    same(ours(muon(adjust_lr, nesterov), weights, gradients), expected, weights)


@BOTH
def test_in_bf16_matrices_are_rounded_as_much_as_torchs(
    adjust_lr: AdjustLr, nesterov: bool
) -> None:
    """The order of a product's sums decides how a value in the middle of two is rounded, and
    processors differ in it. So both are compared with iterations in float64: they are equally far
    from them."""
    weights, gradients = case()
    gradients = gradients[:10]
    exact = {n: w.double() for n, w in weights.items()}
    with torch_iterates_in(torch.float64):
        exact = theirs(
            in_torch(adjust_lr, nesterov),
            exact,
            [{n: g.double() for n, g in step.items()} for step in gradients],
        )
    in_bf16 = theirs(in_torch(adjust_lr, nesterov), weights, gradients)
    found = ours(muon(adjust_lr, nesterov), weights, gradients, dtype=torch.bfloat16)
    for name, weight in exact.items():
        error, torchs = ((each[name] - weight).norm() for each in (found, in_bf16))
        assert torchs > 0.01 * (weight - weights[name]).norm(), name
        assert 2 / 3 < error / torchs < 1.5, f"{name}: {error:.1e}, torch's {torchs:.1e}"


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
