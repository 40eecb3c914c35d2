"""Cross-entropy as (loss_sum, weight_sum), never a mean (design law 3).

The sum over supervised tokens adds up exactly over micro-batches, accumulation and devices; the
step divides once by the global weight. Logits are computed and freed chunk by chunk along the
sequence, and the gradients are computed in the same pass. So memory holds one chunk of [B,
S/chunks, V] instead of all logits, and no logit is computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchprime.losses.token_loss import CROSS_ENTROPY, TokenLoss, cost_of

IGNORED = -100

# Shape suffixes: B batch, S sequence, C a chunk of S, D hidden, V vocab, G groups of rows, T tokens
# of a group.


class _Needs(NamedTuple):
    """The gradients that a caller needs; that of hidden states is always computed along."""

    of_hidden: bool
    of_weight: bool  # False if the output projection is frozen


class _Chunk(NamedTuple):
    """The weighted losses [B, C] of a chunk and, if needed, gradients of their sum."""

    losses: Tensor
    terms: list[Tensor]  # by TokenLoss.terms, summed
    of_hidden: Tensor | None = None
    of_weight: Tensor | None = None  # [G, D, V], of each group of rows


def _chunk(
    x_BCD: Tensor,
    w_VD: Tensor,
    t_BC: Tensor,
    weight_BC: Tensor,
    needs: _Needs,
    groups: int,
    kind: TokenLoss,
) -> _Chunk:
    """Compute one chunk.

    The gradient of -log softmax(z)[t] is softmax(z) - onehot(t). The one-hot is a comparison, not a
    gather: it stays local when the vocabulary is sharded, and it fuses.
    """
    logits = torch.matmul(x_BCD, w_VD.t()).float()
    vocabulary = torch.arange(w_VD.shape[0], device=t_BC.device, dtype=t_BC.dtype)
    onehot = t_BC[..., None] == vocabulary
    top = logits.amax(dim=-1, keepdim=True)
    exp = torch.exp(logits - top)
    total = exp.sum(dim=-1, keepdim=True)
    at_target = torch.where(onehot, logits - top, 0.0).sum(dim=-1)
    # An ignored token has weight 0, but its target (-100) matches nothing. Select instead of
    # multiplying, so that an infinite logit there cannot make the loss 0 * inf.
    nll = torch.where(weight_BC != 0, total.squeeze(-1).log() - at_target, 0.0)
    if kind == CROSS_ENTROPY:
        cost = None
        losses, terms = nll * weight_BC, []
    else:
        log_z = torch.where(weight_BC != 0, (total.log() + top).squeeze(-1), 0.0)
        mean = None
        if kind.label_smoothing:
            mean = torch.where(weight_BC != 0, logits.mean(dim=-1), 0.0)
        cost = cost_of(kind, nll, log_z, mean, w_VD.shape[0])
        losses = cost.loss * weight_BC
        terms = [(part * weight_BC).sum() for part in (nll, cost.z_loss)[: len(kind.terms)]]
    if not any(needs):
        return _Chunk(losses, terms)
    softmax, hot = exp / total, onehot.to(exp.dtype)
    g = (softmax - hot if cost is None else cost.gradient(softmax, hot)) * weight_BC[..., None]
    g_BCV = g.to(x_BCD.dtype)
    grad_x = torch.matmul(g_BCV, w_VD)
    if not needs.of_weight:
        return _Chunk(losses, terms, grad_x)
    # As x' g, since XLA on the CPU transposes the left side in memory: D is narrower than V.
    x_GTD, g_GTV = (each.reshape(groups, -1, each.shape[-1]) for each in (x_BCD, g_BCV))
    return _Chunk(losses, terms, grad_x, torch.matmul(x_GTD.transpose(1, 2), g_GTV))


class LossSums(NamedTuple):
    """The loss results of a forward pass."""

    loss_sum: Tensor  # fp32 scalar
    weight_sum: Tensor  # fp32 scalar
    each: Tensor  # fp32 [B, S], every token's share of loss_sum; carries no gradient
    terms: tuple[Tensor, ...] = ()  # detached parts of loss_sum, by StepOptions.loss_terms


class Spread(NamedTuple):
    """The distribution of the loss over devices; the default is one device.

    The gradient of a shared weight is summed over chunks separately for each group of rows, and
    over groups at the end. If the rows of a group are on one device, devices communicate once and
    not once for each chunk.
    """

    groups: int = 1
    # Annotates the sharding of the weight's gradient [V, D] where it is summed over groups.
    cut_gradient: Callable[[Tensor], Tensor] = lambda gradient: gradient
    # Returns (a chunk's input, the sum so far), so that the chunk starts after the sum is computed:
    # a compiler that sees all chunks at once would keep the parts of all for one long sum.
    in_order: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda x, total: (x, total)


ONE_DEVICE = Spread()


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        w_VD: Tensor,
        t_BS: Tensor,
        weight_BS: Tensor,
        chunks: int,
        spread: Spread,
        needs: _Needs,
        kind: TokenLoss,
    ) -> tuple[Tensor, ...]:
        length = -(-x_BSD.shape[1] // chunks)
        loss_sum = torch.zeros((), dtype=torch.float32, device=x_BSD.device)
        losses: list[Tensor] = []
        terms: list[Tensor] = []
        grads_x: list[Tensor] = []
        grad_w: Tensor | None = None
        for start in range(0, x_BSD.shape[1], length):
            part = slice(start, start + length)
            x_BCD = x_BSD[:, part]
            if grad_w is not None:
                x_BCD, grad_w = spread.in_order(x_BCD, grad_w)
            elif grads_x:
                x_BCD, grads_x[-1] = spread.in_order(x_BCD, grads_x[-1])
            chunk = _chunk(
                x_BCD, w_VD, t_BS[:, part], weight_BS[:, part], needs, spread.groups, kind
            )
            loss_sum = loss_sum + chunk.losses.sum()
            losses.append(chunk.losses)
            more = chunk.terms
            terms = [a + b for a, b in zip(terms, more, strict=True)] if terms else more
            if chunk.of_hidden is not None:
                grads_x.append(chunk.of_hidden)
            if (gw := chunk.of_weight) is not None:
                # Summed in fp32: with bf16 weights the sum over chunks would lose low bits.
                grad_w = gw.float() if grad_w is None else grad_w + gw
        if grads_x:
            whole = None
            if grad_w is not None:
                # Devices exchange it in the weights' type, like every other gradient.
                whole = spread.cut_gradient(grad_w.to(w_VD.dtype).sum(dim=0).t())
            ctx.save_for_backward(torch.cat(grads_x, dim=1), whole)
        each = torch.cat(losses, dim=1)
        ctx.mark_non_differentiable(each, *terms)
        return loss_sum, each, *terms

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_x, grad_w = ctx.saved_tensors
        of_weight = None if grad_w is None else grad * grad_w
        return grad * grad_x, of_weight, None, None, None, None, None, None


def token_weights(targets: Tensor, loss_weights: Tensor) -> Tensor:
    """Return each token's weight [B, S], 0 where there is no target."""
    return torch.where(targets == IGNORED, 0.0, loss_weights)


def chunked_cross_entropy(
    hidden: Tensor,
    output_weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor,
    chunks: int = 8,
    spread: Spread = ONE_DEVICE,
    kind: TokenLoss = CROSS_ENTROPY,
) -> LossSums:
    """Return the weighted sum of next-token losses without full logits.

    Args:
        hidden: [B, S, D] hidden states after the final norm.
        output_weight: [V, D].
        targets: integers [B, S], already shifted; -100 carries no loss.
        loss_weights: fp32 [B, S]; used only where there is a target.
        chunks: number of pieces of the sequence; memory for logits falls by this factor.
        spread: the distribution of rows and weight over devices.
        kind: the loss of a token.

    Returns:
        The loss in nats, as a sum to differentiate and as a detached value per token; for a kind
        with terms also these, detached.
    """
    weights = token_weights(targets, loss_weights)
    # Grad mode is always off inside a Function's forward, so it is read here.
    on = torch.is_grad_enabled()
    needs = _Needs(on and hidden.requires_grad, on and output_weight.requires_grad)
    loss_sum, each, *terms = _ChunkedCrossEntropy.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, output_weight, targets, weights, chunks, spread, needs, kind
    )
    return LossSums(loss_sum, weights.sum(), each, tuple(terms))
