"""The chunked loss against the plain one in float64: value, both gradients, odd chunkings."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.trainer_pt_utils import LabelSmoother

from torchprime.losses.chunks import Projection, Spread
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.losses.token_loss import CROSS_ENTROPY, TokenLoss

B, S, D, V = 3, 13, 8, 29


def _case(seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(B, S, D, generator=g)
    weight = torch.randn(V, D, generator=g)
    targets = torch.randint(0, V, (B, S), generator=g)
    targets[torch.rand(B, S, generator=g) < 0.4] = -100
    loss_weights = torch.rand(B, S, generator=g) * 3
    return hidden, weight, targets, loss_weights


def _naive(hidden, weight, targets, loss_weights, softcap: float | None):
    """Full logits in float64, one token at a time weighted: what is meant."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logits = h @ w.T
    if softcap is not None:
        logits = softcap * (logits / softcap).tanh()
    nll = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    loss = (nll * loss_weights.flatten().double()).sum()
    loss.backward()
    supervised = targets >= 0
    return loss.detach(), loss_weights[supervised].double().sum(), h.grad, w.grad


SOFTCAP = 2.0  # half of the logits are above it


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize(("groups", "vocabulary_first"), [(1, False), (3, False), (3, True)])
@pytest.mark.parametrize("chunks", [1, 2, 5, 13, 64])
def test_equals_the_plain_loss_and_its_gradients(
    chunks: int, groups: int, vocabulary_first: bool, softcap: float | None
) -> None:
    hidden, weight, targets, loss_weights = _case()
    loss, weight_sum, grad_h, grad_w = _naive(hidden, weight, targets, loss_weights, softcap)
    h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    output = Projection(w, softcap)
    spread = Spread(groups, vocabulary_first=vocabulary_first)
    sums = chunked_cross_entropy(h, output, targets, loss_weights, chunks, spread)
    ours, our_weight = sums.loss_sum, sums.weight_sum
    (ours * 0.5).backward()  # an upstream gradient other than 1
    torch.testing.assert_close(ours.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(our_weight.double(), weight_sum, rtol=1e-6, atol=0)
    assert h.grad is not None and w.grad is not None
    torch.testing.assert_close(h.grad.double() * 2, grad_h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double() * 2, grad_w, rtol=1e-5, atol=1e-5)


def test_a_frozen_output_weight_has_no_gradient() -> None:
    """Loss and the gradient of hidden states stay; one product of three is spared."""
    hidden, weight, targets, loss_weights = _case()
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            products[-1] += func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default)
            return func(*args, **(kwargs or {}))

    found = []
    for trained in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)
        products.append(0)
        with Products():
            loss = chunked_cross_entropy(h, Projection(w), targets, loss_weights, 4)[0]
        loss.backward()
        assert h.grad is not None and (w.grad is not None) == trained
        found.append((loss.detach(), h.grad))
    assert products == [4 * 3, 4 * 2]
    torch.testing.assert_close(found[0], found[1])


def test_never_makes_the_full_logits() -> None:
    """No tensor of B x S x V elements, in either direction."""
    hidden, weight, targets, loss_weights = _case()
    sizes = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (out if isinstance(out, tuple) else (out,))
                if isinstance(t, torch.Tensor)
            )
            return out

    h, w = hidden.requires_grad_(), weight.requires_grad_()
    with Sizes():
        chunked_cross_entropy(h, Projection(w), targets, loss_weights, 4)[0].backward()
    assert max(sizes) == B * 4 * V  # 13 positions in 4 chunks: at most 4 each


def test_ignored_tokens_may_hold_anything() -> None:
    """Weights or hidden states at ignored places, even infinite logits, leave the loss alone."""
    hidden, weight, targets, loss_weights = _case()
    reference = chunked_cross_entropy(hidden, Projection(weight), targets, loss_weights, 3)[0]
    other = loss_weights.clone()
    other[targets < 0] = 7.0
    assert chunked_cross_entropy(hidden, Projection(weight), targets, other, 3)[0] == reference
    spoiled = hidden.clone()
    spoiled[targets < 0] = 1e30
    loss = chunked_cross_entropy(spoiled, Projection(weight), targets, loss_weights, 3)[0]
    torch.testing.assert_close(loss, reference)


def test_nothing_supervised_is_zero_not_nan() -> None:
    hidden, weight, targets, loss_weights = _case()
    h = hidden.requires_grad_()
    loss, weight_sum = chunked_cross_entropy(
        h, Projection(weight), targets * 0 - 100, loss_weights, 3
    )[:2]
    loss.backward()
    assert h.grad is not None
    assert loss == 0 and weight_sum == 0 and h.grad.abs().sum() == 0


# Variants -----------------------------------------------------------------------------------------

KINDS = {
    "smoothing": TokenLoss(label_smoothing=0.1),
    "z_loss": TokenLoss(z_loss=1e-2),
    "dft": TokenLoss(dft=True),
    "smoothing, z_loss": TokenLoss(label_smoothing=0.3, z_loss=1e-1),
    "dft, z_loss": TokenLoss(dft=True, z_loss=1e-2),
}


def _token_by_token(kind: TokenLoss, softcap, hidden, weight, targets, loss_weights):
    """The variants as they are defined, in float64, one token after another."""
    h, w = hidden.double().requires_grad_(), weight.double().requires_grad_()
    loss = cross_entropy = z_loss = torch.zeros((), dtype=torch.float64)
    for b, s in (targets >= 0).nonzero().tolist():
        logits, factor = w @ h[b, s], loss_weights[b, s].double()
        logits = logits if softcap is None else softcap * (logits / softcap).tanh()
        nll = -F.log_softmax(logits, 0)[targets[b, s]]
        each = nll
        if kind.dft:
            each = torch.softmax(logits, 0)[targets[b, s]].detach() * nll
        elif kind.label_smoothing:
            each = F.cross_entropy(logits, targets[b, s], label_smoothing=kind.label_smoothing)
        squared = kind.z_loss * logits.logsumexp(0) ** 2
        loss = loss + factor * (each + squared)
        cross_entropy = cross_entropy + factor * nll.detach()
        z_loss = z_loss + factor * squared.detach()
    loss.backward()
    return loss.detach(), [cross_entropy, z_loss], h.grad, w.grad


@pytest.mark.parametrize("softcap", [None, SOFTCAP])
@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("name", KINDS)
def test_variants_equal_a_loop_over_tokens(name: str, chunks: int, softcap: float | None) -> None:
    kind, given = KINDS[name], _case()
    loss, terms, grad_h, grad_w = _token_by_token(kind, softcap, *given)
    hidden, weight, targets, loss_weights = given
    h, w = (x.clone().requires_grad_() for x in (hidden, weight))
    output = Projection(w, softcap)
    ours = chunked_cross_entropy(h, output, targets, loss_weights, chunks, Spread(3), kind)
    (ours.loss_sum * 0.5).backward()
    torch.testing.assert_close(ours.loss_sum.double(), loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ours.each.sum(), ours.loss_sum.detach(), rtol=1e-6, atol=0)
    assert len(ours.terms) == len(kind.terms) and not any(t.requires_grad for t in ours.terms)
    for found, expected in zip(ours.terms, terms, strict=False):
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)
    assert h.grad is not None and w.grad is not None
    torch.testing.assert_close(h.grad.double() * 2, grad_h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double() * 2, grad_w, rtol=1e-5, atol=1e-5)


def test_variants_name_what_they_report() -> None:
    assert CROSS_ENTROPY.terms == () and TokenLoss(dft=True).terms == ("cross_entropy",)
    assert TokenLoss(0.1, 1e-4).terms == ("cross_entropy", "z_loss")


@pytest.mark.parametrize("name", KINDS)
def test_variants_leave_ignored_tokens_out(name: str) -> None:
    hidden, weight, targets, loss_weights = _case()
    spoiled = hidden.clone()
    spoiled[targets < 0] = torch.inf
    expected, found = (
        chunked_cross_entropy(h, Projection(weight), targets, loss_weights, 3, kind=KINDS[name])
        for h in (hidden, spoiled)
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", KINDS)
def test_variants_never_make_the_full_logits(name: str) -> None:
    (hidden, weight, targets, loss_weights), largest = _case(), [0]

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest[0] = max(largest[0], out.numel())
            return out

    with Sizes():
        h, w = (x.requires_grad_() for x in (hidden, weight))
        sums = chunked_cross_entropy(h, Projection(w), targets, loss_weights, 4, kind=KINDS[name])
        sums.loss_sum.backward()
    assert largest[0] == B * 4 * V


def test_smoothing_is_the_one_of_transformers() -> None:
    hidden, weight, targets, loss_weights = _case()
    smoother = LabelSmoother(epsilon=0.2)
    theirs = smoother({"logits": hidden @ weight.T}, targets)
    ones = torch.ones_like(loss_weights)
    ours = chunked_cross_entropy(hidden, Projection(weight), targets, ones, 3, kind=TokenLoss(0.2))
    torch.testing.assert_close(ours.loss_sum / ours.weight_sum, theirs)
