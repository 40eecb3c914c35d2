"""The loss over the tokens that carry loss, against the same loss over the sequence."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from torchprime.losses.chunks import ONE_DEVICE, Body, Projection, Spread
from torchprime.losses.cross_entropy import IGNORED, LossSums, chunked_cross_entropy
from torchprime.losses.divergence import BaseOutput, chunked_divergence
from torchprime.losses.selection import Selection
from torchprime.losses.token_loss import CROSS_ENTROPY, TokenLoss

B, S, D, V = 4, 16, 8, 24
SHARES = {"none": 0.0, "some": 0.4, "one": None, "all": 1.0}


class CountedLoop:
    """A loop in Python that keeps what it was told to run."""

    def __init__(self) -> None:
        self.rounds: list[int] = []

    def __call__(
        self, body: Body, carry: list[Tensor], xs: list[Tensor], first: Tensor
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run the rounds from `first`, as `Spread.loop` says."""
        rounds = range(int(first), len(xs[0]))
        self.rounds += rounds
        found = {i: None for i in range(len(xs[0]))}
        with torch.no_grad():
            shapes = [torch.zeros_like(y) for y in body(carry, [x[0] for x in xs])[1]]
            ys = [[torch.zeros_like(shape) for _ in found] for shape in shapes]
            for i in rounds:
                carry, values = body(carry, [x[i] for x in xs])
                for each, value in zip(ys, values, strict=True):
                    each[i] = value
        return list(carry), [torch.stack(each) for each in ys]


def case(share: float | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, output weight, targets and weights."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, S, D, generator=generator).requires_grad_()
    w = torch.randn(V, D, generator=generator).requires_grad_()
    targets = torch.randint(0, V, (B, S), generator=generator)
    if share is None:
        ignored = torch.ones(B, S, dtype=torch.bool)
        ignored[2, 5] = False
    else:
        ignored = torch.rand(B, S, generator=generator) >= share
    weights = torch.rand(B, S, generator=generator) + 0.5
    return x, w, targets.masked_fill(ignored, IGNORED), weights


def same(given: tuple[LossSums, Sequence[Tensor]], wanted: tuple[LossSums, Sequence[Tensor]]):
    """Assert that losses, their terms and gradients are equal but for the order of sums."""
    for a, b in zip(given[0][:3], wanted[0][:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    for group in zip((*given[0].terms, *given[1]), (*wanted[0].terms, *wanted[1]), strict=True):
        torch.testing.assert_close(*group, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunks", [1, 3, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("share", SHARES)
def test_the_loss_is_that_over_the_sequence(share: str, groups: int, chunks: int) -> None:
    """3 chunks leave slots without a token."""
    x, w, targets, weights = case(SHARES[share])

    def of(spread: Spread, kind: TokenLoss) -> tuple[LossSums, Sequence[Tensor]]:
        # Half of the logits are above 2.
        output = Projection(w, 2.0 if share == "some" else None)
        sums = chunked_cross_entropy(x, output, targets, weights, chunks, spread, kind)
        return sums, torch.autograd.grad(sums.loss_sum, (x, w))

    for kind in (CROSS_ENTROPY, TokenLoss(label_smoothing=0.1, z_loss=0.01)):
        loop = CountedLoop()
        spread = Spread(groups, loop=loop, vocabulary_first=groups == 2)
        same(of(spread, kind), of(ONE_DEVICE, kind))
        counted = (targets != IGNORED).reshape(groups, -1).sum(dim=1).max().item()
        length = -(-B * S // groups // chunks)
        assert len(loop.rounds) == -(-counted // length)
        assert loop.rounds == list(range(chunks - len(loop.rounds), chunks))


def test_a_frozen_weight_gets_no_gradient() -> None:
    x, w, targets, weights = case(0.4)
    spread, output = Spread(loop=CountedLoop()), Projection(w.detach())
    sums = chunked_cross_entropy(x, output, targets, weights, 4, spread)
    (gradient,) = torch.autograd.grad(sums.loss_sum, (x,))
    whole = chunked_cross_entropy(x, output, targets, weights)
    same((sums, [gradient]), (whole, torch.autograd.grad(whole.loss_sum, (x,))))


def test_the_loss_alone_needs_no_gradient() -> None:
    x, w, targets, weights = case(0.4)
    with torch.no_grad():
        looped = chunked_cross_entropy(
            x, Projection(w), targets, weights, 4, Spread(loop=CountedLoop())
        )
        same((looped, []), (chunked_cross_entropy(x, Projection(w), targets, weights), []))


@pytest.mark.parametrize(("groups", "softcap"), [(1, None), (2, 1.5)])
def test_a_divergence_is_that_over_the_sequence(groups: int, softcap: float | None) -> None:
    x, w, targets, weights = case(0.4)
    weights = torch.where(targets == IGNORED, 0.0, weights)
    base = BaseOutput(x.detach().flip(0), Projection(w.detach() * 1.1, softcap))

    def of(spread: Spread) -> tuple[LossSums, Sequence[Tensor]]:
        sums = chunked_divergence(x, Projection(w, softcap), base, weights, 4, spread)
        return sums, torch.autograd.grad(sums.loss_sum, (x, w))

    loop = CountedLoop()
    same(of(Spread(groups, loop=loop)), of(ONE_DEVICE))
    assert 0 < len(loop.rounds) < 4


def test_tokens_that_carry_loss_come_last_in_their_order() -> None:
    counted = torch.tensor([[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 0]]).bool()
    selection = Selection(counted, groups=2, chunks=4)
    number = torch.arange(12).view(4, 3)
    taken = selection.take(number)
    assert taken.shape == (4, 2, 2)
    by_group = taken.transpose(0, 1).flatten(1)
    assert by_group[:, 2:].tolist() == [[1, 3, 4, 5, 0, 2], [6, 11, 7, 8, 9, 10]]
    assert selection.padding.transpose(0, 1).flatten(1)[:, :3].tolist() == [[True, True, False]] * 2
    assert torch.equal(selection.put_back(taken), number)
    assert selection.first.item() == 2  # four tokens of the second group fill two chunks
