"""A weighted sum over tokens and its gradients, computed chunk by chunk along the sequence.

Logits exist for one chunk of [B, S/chunks, V] at a time, and the gradients of the sum are computed
in the same pass, so no logit is computed twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Shape suffixes: B batch, S sequence, C a chunk of S, D hidden, V vocab, G groups of rows, T tokens
# of a group.


# Bytes of a chunk's logits in fp32 on one device, where each operation makes a tensor: there are
# about five of that size at a time.
CHUNK_BYTES = 2**28


def tpu_chunk_bytes(memory: int | None) -> int:
    """Return the bytes of a chunk's logits on a TPU, whose compiler fuses most of these tensors.
    Larger chunks read the output weight less often.

    Args:
        memory: of a chip; None if it is not known.
    """
    return 2**30 if memory is None else min(2**30, memory // 30)


def chunks_for(rows: int, length: int, vocabulary: int, most: int = CHUNK_BYTES) -> int:
    """Return the smallest number of chunks whose fp32 logits take at most `most` bytes.

    Args:
        rows: of a micro-batch on one device.
        length: tokens of a row, the largest number of chunks.
    """
    whole = rows * length * vocabulary * torch.float32.itemsize
    return max(1, min(length, math.ceil(whole / most)))


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
    chunk_bytes: int = CHUNK_BYTES


ONE_DEVICE = Spread()


class Needs(NamedTuple):
    """The gradients that a caller needs; that of hidden states is always computed along."""

    of_hidden: bool
    of_weight: bool  # False if the output projection is frozen


class Chunk(NamedTuple):
    """The weighted losses [B, C] of a chunk and, if needed, gradients of their sum."""

    losses: Tensor
    terms: list[Tensor]  # named sums beside the loss, one for each row [B]
    of_hidden: Tensor | None = None
    of_weight: Tensor | None = None  # [G, D, V], of each group of rows


# (the chunk's part of the sequence, hidden states [B, C, D], output weight [V, D]) -> the chunk.
Compute = Callable[[slice, Tensor, Tensor], Chunk]


def products(
    g_BCV: Tensor, x_BCD: Tensor, w_VD: Tensor, needs: Needs, groups: int
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients by hidden states and weight from that by the logits, for `Chunk`."""
    g_BCV = g_BCV.to(x_BCD.dtype)
    of_hidden = torch.matmul(g_BCV, w_VD)
    if not needs.of_weight:
        return of_hidden, None
    # As x' g, since XLA on the CPU transposes the left side in memory: D is narrower than V.
    x_GTD, g_GTV = (each.reshape(groups, -1, each.shape[-1]) for each in (x_BCD, g_BCV))
    return of_hidden, torch.matmul(x_GTD.transpose(1, 2), g_GTV)


class ChunkedSum(torch.autograd.Function):
    """The sum over chunks: (hidden [B, S, D], weight [V, D]) -> (sum, each token's share, terms).

    Its gradients are computed in the forward.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BSD: Tensor, w_VD: Tensor, compute: Compute, chunks: int | None, spread: Spread
    ) -> tuple[Tensor, ...]:
        if chunks is None:
            own_rows = -(-x_BSD.shape[0] // spread.groups)
            chunks = chunks_for(own_rows, x_BSD.shape[1], w_VD.shape[0], spread.chunk_bytes)
        length = -(-x_BSD.shape[1] // chunks)
        # Sums stay apart for each row until the end, where devices add theirs once.
        rows = torch.zeros(x_BSD.shape[0], dtype=torch.float32, device=x_BSD.device)
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
            chunk = compute(part, x_BCD, w_VD)
            rows = rows + chunk.losses.sum(dim=1)
            losses.append(chunk.losses)
            more = chunk.terms
            terms = [a + b for a, b in zip(terms, more, strict=True)] if terms else more
            if chunk.of_hidden is not None:
                grads_x.append(chunk.of_hidden)
            if (of_weight := chunk.of_weight) is not None:
                # Summed in fp32: with bf16 weights the sum over chunks would lose low bits.
                grad_w = of_weight.float() if grad_w is None else grad_w + of_weight
        if grads_x:
            whole = None
            if grad_w is not None:
                # Devices exchange it in the weights' type, like every other gradient.
                whole = spread.cut_gradient(grad_w.to(w_VD.dtype).sum(dim=0).t())
            ctx.save_for_backward(torch.cat(grads_x, dim=1), whole)
        each, sums = torch.cat(losses, dim=1), [term.sum() for term in terms]
        ctx.mark_non_differentiable(each, *sums)
        return rows.sum(), each, *sums

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        whole = None if of_weight is None else grad * of_weight
        return grad * of_hidden, whole, None, None, None
