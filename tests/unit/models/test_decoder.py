"""Initial weights of a decoder: their spread, and what they depend on."""

from __future__ import annotations

import pytest
import torch

from torchprime.models.decoder import initial_tensor

SHAPE = torch.Size((256, 64))


def test_spread_of_a_matrix() -> None:
    values = initial_tensor("model.layers.0.mlp.up_proj.weight", SHAPE, 0.02, seed=1)
    assert values.std() == pytest.approx(0.02, rel=0.05) and abs(values.mean()) < 1e-3


@pytest.mark.parametrize(
    ("name", "seed"), [("a.weight", 2), ("b.weight", 1), ("a.weight", 2**32 + 1)]
)
def test_another_seed_or_name_gives_other_values(name: str, seed: int) -> None:
    first = initial_tensor("a.weight", SHAPE, 0.02, seed=1)
    assert torch.equal(first, initial_tensor("a.weight", SHAPE, 0.02, seed=1))
    assert (first != initial_tensor(name, SHAPE, 0.02, seed=seed)).float().mean() > 0.99


def test_norms_are_one_and_biases_zero() -> None:
    assert initial_tensor("model.norm.weight", torch.Size((8,)), 0.02, 1).eq(1).all()
    assert initial_tensor("q_proj.bias", torch.Size((8,)), 0.02, 1).eq(0).all()
