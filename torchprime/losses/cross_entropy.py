"""Cross-entropy as (loss_sum, weight_sum), never a mean (design law 3).

The sum over supervised tokens adds up exactly over micro-batches, accumulation and devices; the
step divides once by the global weight. Logits are computed and freed chunk by chunk (chunks.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from torchprime.losses.chunks import (
    ONE_DEVICE,
    Chunk,
    ChunkedSum,
    Needs,
    Projection,
    Spread,
    Summed,
    products,
)
from torchprime.losses.token_loss import CROSS_ENTROPY, TokenLoss, cost_of

IGNORED = -100

# Shape suffixes: B batch, S sequence, C a chunk of S, D hidden, V vocab.


class _Asked(NamedTuple):
    """The loss that a caller asks for."""

    kind: TokenLoss
    softcap: float | None  # of the logits
    needs: Needs
    spread: Spread


def _chunk(
    x_BCD: Tensor,
    w_VD: Tensor,
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    *,
    asked: _Asked,
) -> Chunk:
    """Compute one chunk.

    The gradient of -log softmax(z)[t] is softmax(z) - onehot(t). The one-hot is a comparison, not a
    gather: it stays local when the vocabulary is sharded, and it fuses.
    """
    (weight_BC, t_BC), (kind, softcap, needs, spread) = tokens, asked
    output = Projection(w_VD, softcap)
    logits = output.logits(x_BCD)
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
            mean = (x_BCD * shared[0]).sum(dim=-1) if shared else logits.mean(dim=-1)
            mean = torch.where(weight_BC != 0, mean, 0.0)
        cost = cost_of(kind, nll, log_z, mean, w_VD.shape[0])
        losses = cost.loss * weight_BC
        terms = [(part * weight_BC).sum(dim=1) for part in (nll, cost.z_loss)[: len(kind.terms)]]
    if not any(needs):
        return Chunk(losses, terms)
    softmax, hot = exp / total, onehot.to(exp.dtype)
    g = (softmax - hot if cost is None else cost.gradient(softmax, hot)) * weight_BC[..., None]
    g = output.by_products(g, logits)
    return Chunk(losses, terms, *products(g, x_BCD, w_VD, needs, spread))


class LossSums(NamedTuple):
    """The loss results of a forward pass."""

    loss_sum: Tensor  # fp32 scalar
    weight_sum: Tensor  # fp32 scalar
    each: Tensor  # fp32 [B, S], every token's share of loss_sum; carries no gradient
    terms: tuple[Tensor, ...] = ()  # detached parts of loss_sum, by StepOptions.loss_terms


def token_weights(targets: Tensor, loss_weights: Tensor) -> Tensor:
    """Return each token's weight [B, S], 0 where there is no target."""
    return torch.where(targets == IGNORED, 0.0, loss_weights)


def chunked_cross_entropy(
    hidden: Tensor,
    output: Projection,
    targets: Tensor,
    loss_weights: Tensor,
    chunks: int | None = None,
    spread: Spread = ONE_DEVICE,
    kind: TokenLoss = CROSS_ENTROPY,
) -> LossSums:
    """Return the weighted sum of next-token losses without full logits.

    Args:
        hidden: [B, S, D] hidden states after the final norm.
        output: the output projection.
        targets: integers [B, S], already shifted; -100 carries no loss.
        loss_weights: fp32 [B, S]; used only where there is a target.
        chunks: number of pieces of the sequence; None: by the bytes of a chunk's logits.
        spread: the distribution of rows and weight over devices.
        kind: the loss of a token.

    Returns:
        The loss in nats, as a sum to differentiate and as a detached value per token; for a kind
        with terms also these, detached.
    """
    weights = token_weights(targets, loss_weights)
    # Grad mode is always off inside a Function's forward, so it is read here.
    on = torch.is_grad_enabled()
    needs = Needs(on and hidden.requires_grad, on and output.weight.requires_grad)
    # The mean logit of label smoothing, as the product with the mean row: devices that hold parts
    # of the vocabulary communicate once for it, and not once for each chunk. Capped logits are not
    # linear in the rows.
    shared: tuple[Tensor, ...] = ()
    if kind.label_smoothing and output.softcap is None:
        shared = (output.weight.detach().mean(dim=0, dtype=torch.float32),)
    compute = partial(_chunk, asked=_Asked(kind, output.softcap, needs, spread))
    terms = len(kind.terms)
    summed = Summed(compute, needs, (weights, targets), shared, terms, chunks, spread)
    loss_sum, each, *more = ChunkedSum.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, output.weight, summed
    )
    return LossSums(loss_sum, weights.sum(), each, tuple(more))
