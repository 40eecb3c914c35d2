"""The divergence of a model from its frozen base: KL(base || model) of every token's next-token
distribution.

    sum over the vocabulary of q (log q - log p), q of the base and p of the model

This is the direction of knowledge distillation (Hinton et al. 2015, arXiv:1503.02531) and of
learning without forgetting (Li and Hoiem 2016, arXiv:1606.09282): the model must give probability
wherever the base does. As for the cross-entropy, logits of both exist for one chunk of the sequence
at a time, and the gradients are computed in the same pass. The base gets none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from torchprime.losses.cross_entropy import LossSums

# Shape suffixes: B batch, S sequence, C a chunk of S, D hidden, V vocab.


class BaseOutput(NamedTuple):
    """The base's hidden states [B, S, D] after the final norm, and its output projection."""

    hidden: Tensor
    output: Projection


def chunked_divergence(
    hidden: Tensor,
    output: Projection,
    base: BaseOutput,
    weights: Tensor,
    chunks: int | None = None,
    spread: Spread = ONE_DEVICE,
) -> LossSums:
    """Return the weighted sum of tokens' divergences without full logits.

    Args:
        hidden: [B, S, D] hidden states after the final norm.
        output: the output projection.
        weights: fp32 [B, S], 0 for a token that does not count.
        chunks: number of pieces of the sequence; None: by the bytes of a chunk's logits.
        spread: the distribution of rows and weight over devices.
    """
    on = torch.is_grad_enabled()
    spread = spread._replace(chunk_bytes=spread.chunk_bytes.shared_by(2))
    needs = Needs(on and hidden.requires_grad, on and output.weight.requires_grad)
    tokens, shared = (weights, base.hidden.detach()), (base.output.weight.detach(),)
    softcaps = output.softcap, base.output.softcap
    compute = partial(_chunk, softcaps=softcaps, needs=needs, spread=spread)
    summed = Summed(compute, needs, tokens, shared, chunks=chunks, spread=spread)
    loss_sum, each = ChunkedSum.apply(  # pyright: ignore[reportGeneralTypeIssues]
        hidden, output.weight, summed
    )
    return LossSums(loss_sum, weights.sum(), each)


# (hidden states, output projection, the base's, weights) -> the sum.
Divergence = Callable[[Tensor, Projection, BaseOutput, Tensor], LossSums]


def _chunk(
    x_BCD: Tensor,
    w_VD: Tensor,
    tokens: Sequence[Tensor],
    shared: Sequence[Tensor],
    *,
    softcaps: tuple[float | None, float | None],
    needs: Needs,
    spread: Spread,
) -> Chunk:
    """Compute one chunk. The gradient of a token's divergence by the model's logits is p - q.

    Args:
        softcaps: of the model's logits and of the base's.
    """
    (weight_BC, base_BCD), (base_VD,) = tokens, shared
    output, base_output = Projection(w_VD, softcaps[0]), Projection(base_VD, softcaps[1])
    # The base's chunk waits like the model's, or its logits of all chunks could be in memory.
    base_BCD, x_BCD = spread.in_order(base_BCD, x_BCD)
    logits = output.logits(x_BCD)
    log_p, log_q = logits.log_softmax(dim=-1), base_output.logits(base_BCD).log_softmax(dim=-1)
    q = log_q.exp()
    # Select instead of multiplying, so that an infinite logit of a token that does not count
    # cannot make the sum 0 * inf.
    divergence = torch.where(weight_BC != 0, (q * (log_q - log_p)).sum(dim=-1), 0.0)
    losses = divergence * weight_BC
    if not any(needs):
        return Chunk(losses, [])
    gradient = output.by_products((log_p.exp() - q) * weight_BC[..., None], logits)
    return Chunk(losses, [], *products(gradient, x_BCD, w_VD, needs, spread))
