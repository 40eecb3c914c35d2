"""Dropout by position: the same mask however a batch is cut, and PEFT's arithmetic."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchprime.adapters.dropout import CounterDropout, set_position
from torchprime.counter_bits import Position


def position(step: int, tokens: Tensor, seed: int = 1) -> Position:
    numbers = (torch.tensor(value, dtype=torch.int32) for value in (seed, step))
    return Position(*numbers, tokens=tokens)


TOKENS = torch.arange(6 * 5, dtype=torch.int32).view(6, 5)
X = torch.randn(6, 5, 16, generator=torch.Generator().manual_seed(0))


def dropped(x: Tensor, where: Position | None, number: int = 3, p: float = 0.4) -> Tensor:
    layer = CounterDropout(p, number)
    set_position(nn.Sequential(layer), where)
    return layer(x)


def test_a_kept_entry_is_scaled_and_the_others_are_0() -> None:
    out = dropped(X, position(7, TOKENS))
    zero = out == 0
    assert 0.25 < zero.float().mean() < 0.55
    torch.testing.assert_close(out[~zero], X[~zero] / 0.6)


def test_micro_batches_and_shards_have_their_part_of_the_mask() -> None:
    whole = dropped(X, position(7, TOKENS))
    parts = [dropped(X[i : i + 2], position(7, TOKENS[i : i + 2])) for i in (0, 2, 4)]
    assert torch.equal(torch.cat(parts), whole)


def test_seed_step_and_layer_change_the_mask() -> None:
    first = dropped(X, position(7, TOKENS)) == 0
    others = [
        dropped(X, position(8, TOKENS)),
        dropped(X, position(7, TOKENS, seed=2)),
        dropped(X, position(7, TOKENS), number=4),
    ]
    assert all(0.3 < (first == (other == 0)).float().mean() < 0.7 for other in others)


def test_evaluation_and_probability_0_change_nothing() -> None:
    assert dropped(X, None) is X
    assert dropped(X, position(7, TOKENS), p=0.0) is X
