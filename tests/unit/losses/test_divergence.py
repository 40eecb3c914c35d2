"""The chunked divergence against torch's kl_div over full logits in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchprime.losses.chunks import Projection, Spread
from torchprime.losses.divergence import BaseOutput, chunked_divergence

B, S, D, V = 4, 7, 5, 11


def inputs(dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], Tensor]:
    """Hidden states and output weights of model and base, and weights with zeros among them."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(B, S, D), (V, D), (B, S, D), (V, D)]
    given = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    weights = torch.randint(0, 3, (B, S), generator=generator).float()
    assert (weights == 0).any()
    return given, weights


def in_float64(
    given: list[Tensor], weights: Tensor, softcap: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum and its gradients by the model's hidden states and output weight."""
    x, w, base_x, base_w = (each.double() for each in given)
    x.requires_grad_()
    w.requires_grad_()
    logits = [x @ w.t(), base_x @ base_w.t()]
    if softcap is not None:
        logits = [softcap * (each / softcap).tanh() for each in logits]
    log_p, log_q = (each.log_softmax(-1) for each in logits)
    each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
    total = (each * weights).sum()
    total.backward()
    assert x.grad is not None and w.grad is not None
    return total.detach(), x.grad, w.grad


@pytest.mark.parametrize("chunks", [1, 3, 7])
@pytest.mark.parametrize(
    ("groups", "softcap", "first"), [(1, None, False), (2, None, True), (2, 1.5, False)]
)
def test_value_and_gradients_are_those_of_float64(
    chunks: int, groups: int, softcap: float | None, first: bool
) -> None:
    """In both orders of the sum of the weight's gradient."""
    given, weights = inputs()
    expected, of_hidden, of_weight = in_float64(given, weights, softcap)
    x, w = given[0].requires_grad_(), given[1].requires_grad_()
    base = BaseOutput(given[2].requires_grad_(), Projection(given[3], softcap))
    output = Projection(w, softcap)
    spread = Spread(groups, vocabulary_first=first)
    found = chunked_divergence(x, output, base, weights, chunks, spread)
    (3 * found.loss_sum).backward()
    torch.testing.assert_close(found.loss_sum.detach().double(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.each.sum(), found.loss_sum.detach())
    assert x.grad is not None and w.grad is not None and base.hidden.grad is None
    torch.testing.assert_close(x.grad.double(), 3 * of_hidden, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(w.grad.double(), 3 * of_weight, rtol=1e-5, atol=1e-5)


def test_a_frozen_output_weight_gets_no_gradient() -> None:
    given, weights = inputs()
    x = given[0].requires_grad_()
    base = BaseOutput(given[2], Projection(given[3]))
    chunked_divergence(x, Projection(given[1]), base, weights, 2).loss_sum.backward()
    assert x.grad is not None and given[1].grad is None


def test_the_base_itself_has_none_and_no_token_is_counted_without_weight() -> None:
    (x, w, base_x, base_w), weights = inputs()
    output = Projection(w)
    same = chunked_divergence(x, output, BaseOutput(x, output), weights)
    assert same.loss_sum == 0
    x[weights == 0] = float("inf")
    found = chunked_divergence(x, output, BaseOutput(base_x, Projection(base_w)), weights)
    assert torch.isfinite(found.loss_sum)


def test_bf16_logits_are_widened() -> None:
    given, weights = inputs(torch.bfloat16)
    x, w = given[0].requires_grad_(), given[1].requires_grad_()
    base = BaseOutput(given[2], Projection(given[3]))
    found = chunked_divergence(x, Projection(w), base, weights, 3)
    expected, _, _ = in_float64([each.detach() for each in given], weights, None)
    assert found.loss_sum.dtype == torch.float32
    assert found.loss_sum.item() == pytest.approx(expected.item(), rel=2e-2)
