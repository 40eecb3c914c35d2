"""A weighted sum over tokens and its gradients, computed chunk by chunk.

Logits exist for one chunk at a time, and the gradients of the sum are computed in the same pass, so
no logit is computed twice. The chunks are either parts [B, S/chunks] of the sequence, or of the
tokens that carry loss (selection.py): a backend that can loop over as many chunks as the data needs
gives `Spread.loop`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchprime.losses.selection import Rows, Selection, rows_of

# Shape suffixes: B batch, S sequence, C a chunk of S, D hidden, V vocab, G groups of rows, T tokens
# of a group.


# With a loop over the tokens that carry loss, at least this many chunks, so that few others are in
# them; but none of fewer tokens than Spread.smallest_chunk.
FEWEST_CHUNKS = 8
SMALLEST_CHUNK = 64


class ChunkBytes(NamedTuple):
    """The most bytes of a chunk's logits, in fp32, on one device."""

    trained: int  # with a gradient of the output weight
    frozen: int

    def of(self, *, trained: bool) -> int:
        """Return the bytes for an output weight that is trained or not."""
        return self.trained if trained else self.frozen

    def shared_by(self, count: int) -> ChunkBytes:
        """Return the bytes of each if so many models have their logits at the same time."""
        return ChunkBytes(self.trained // count, self.frozen // count)


# Where each operation makes a tensor, there are about five of that size at a time.
CHUNK_BYTES = ChunkBytes(2**28, 2**28)


def tpu_chunk_bytes(memory: int | None) -> ChunkBytes:
    """Return the bytes of a chunk's logits on a TPU, whose compiler fuses most of these tensors.

    Larger chunks read the output weight less often. If it has a gradient, each chunk after the
    first also reads and writes its fp32 sum, and the compiler keeps the gradients by the logits of
    all chunks: more chunks then take more time and often more memory.

    Args:
        memory: of a chip; None if it is not known: 1 GiB for both.
    """
    if memory is None:
        return ChunkBytes(2**30, 2**30)
    return ChunkBytes(trained=memory // 6, frozen=min(2**30, memory // 30))


def balanced_chunk(flops: float, bytes_per_s: float) -> int:
    """Return the tokens of a chunk whose part of the weight's gradient takes as long to compute as
    its fp32 sum takes to read and write: 2 C V D / flops = 8 V D / bytes_per_s. Smaller chunks wait
    for the memory."""
    return math.ceil(4 * flops / bytes_per_s)


def chunks_for(rows: int, length: int, vocabulary: int, most: int) -> int:
    """Return the smallest number of chunks whose fp32 logits take at most `most` bytes.

    Args:
        rows: of a micro-batch on one device.
        length: tokens of a row, the largest number of chunks.
    """
    whole = rows * length * vocabulary * torch.float32.itemsize
    return max(1, min(length, math.ceil(whole / most)))


Body = Callable[[Sequence[Tensor], Sequence[Tensor]], tuple[list[Tensor], list[Tensor]]]
# (body, carry, xs, first): runs (carry, x_i) -> (carry, y_i) for i from `first`, a scalar of data,
# to the end of dim 0 of xs. The y_i before it are 0.
Loop = Callable[[Body, list[Tensor], list[Tensor], Tensor], tuple[list[Tensor], list[Tensor]]]


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
    chunk_bytes: ChunkBytes = CHUNK_BYTES
    # For a loop: annotate the weight [V, D] as gathered by the devices with different rows, and the
    # sum of its gradient as theirs; take tokens of each group.
    gather: Callable[[Tensor], Tensor] = lambda weight: weight
    keep: Callable[[Tensor], Tensor] = lambda total: total
    rows: Rows = rows_of
    smallest_chunk: int = SMALLEST_CHUNK  # tokens on a device, with a loop
    # The sum of the weight's gradient is [G, V, D], like the weight and its optimizer's state: for
    # the other order a TPU's compiler transposes the state, and transposes it back. False:
    # [G, D, V], since XLA on the CPU transposes a product's left side in memory, and D is narrower
    # than V.
    vocabulary_first: bool = False
    loop: Loop | None = None  # None: the chunks are parts of the sequence


ONE_DEVICE = Spread()


class Projection(NamedTuple):
    """The map from hidden states to logits.

    Attributes:
        weight: [V, D].
        softcap: a logit x becomes softcap * tanh(x / softcap) (Gemma 2, arXiv:2408.00118); None:
            it stays as it is.
    """

    weight: Tensor
    softcap: float | None = None

    def logits(self, x_BCD: Tensor) -> Tensor:
        """Return the logits [B, C, V] of hidden states, in fp32."""
        products = torch.matmul(x_BCD, self.weight.t()).float()
        if self.softcap is None:
            return products
        return self.softcap * torch.tanh(products / self.softcap)

    def by_products(self, g_BCV: Tensor, logits: Tensor) -> Tensor:
        """Return a gradient by the products with the weight, from that by the logits."""
        return g_BCV if self.softcap is None else g_BCV * (1 - (logits / self.softcap).square())


class Needs(NamedTuple):
    """The gradients that a caller needs; that of hidden states is always computed along."""

    of_hidden: bool
    of_weight: bool  # False if the output projection is frozen


class Chunk(NamedTuple):
    """The weighted losses [B, C] of a chunk and, if needed, gradients of their sum."""

    losses: Tensor
    terms: list[Tensor]  # named sums beside the loss, one for each row [B]
    of_hidden: Tensor | None = None
    of_weight: Tensor | None = None  # [G, D, V] or [G, V, D], of each group of rows


# (hidden states [B, C, D], output weight [V, D], values of the chunk's tokens [B, C, ...], tensors
# that all chunks share) -> the chunk.
Compute = Callable[[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]], Chunk]


class Summed(NamedTuple):
    """A sum over tokens, as a caller asks for it.

    Attributes:
        compute: computes a chunk. It reads no other tensors than its arguments.
        needs: the gradients that it computes.
        tokens: values of tokens, each [B, S, ...]; the first are the weights, 0 for a token that
            carries no loss.
        shared: the other tensors that `compute` needs.
        terms: number of sums beside the loss.
        chunks: None: by the bytes of a chunk's logits.
    """

    compute: Compute
    needs: Needs
    tokens: tuple[Tensor, ...]
    shared: tuple[Tensor, ...] = ()
    terms: int = 0
    chunks: int | None = None
    spread: Spread = ONE_DEVICE


def products(
    g_BCV: Tensor, x_BCD: Tensor, w_VD: Tensor, needs: Needs, spread: Spread
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients by hidden states and weight from that by the logits, for `Chunk`."""
    g_BCV = g_BCV.to(x_BCD.dtype)
    of_hidden = torch.matmul(g_BCV, w_VD)
    if not needs.of_weight:
        return of_hidden, None
    x_GTD, g_GTV = (each.reshape(spread.groups, -1, each.shape[-1]) for each in (x_BCD, g_BCV))
    left, right = (g_GTV, x_GTD) if spread.vocabulary_first else (x_GTD, g_GTV)
    return of_hidden, torch.matmul(left.transpose(1, 2), right)


class _Sums(NamedTuple):
    """The sums over all chunks."""

    rows: Tensor  # fp32 [B] or [G]: added up at the end, where devices add theirs once
    each: Tensor  # [B, S]
    terms: list[Tensor]  # each like rows
    of_hidden: Tensor | None  # [B, S, D]
    of_weight: Tensor | None  # like a chunk's; fp32, since a sum in bf16 would lose low bits


class ChunkedSum(torch.autograd.Function):
    """The sum over chunks: (hidden [B, S, D], weight [V, D], Summed) -> (sum, each token's share,
    terms).

    Its gradients are computed in the forward.
    """

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, w_VD: Tensor, summed: Summed) -> tuple[Tensor, ...]:
        spread, chunks = summed.spread, summed.chunks
        looped = spread.loop is not None and x_BSD.shape[0] % spread.groups == 0
        if chunks is None:
            own_rows = -(-x_BSD.shape[0] // spread.groups)
            most = spread.chunk_bytes.of(trained=summed.needs.of_weight)
            chunks = chunks_for(own_rows, x_BSD.shape[1], w_VD.shape[0], most)
            if looped:
                most = own_rows * x_BSD.shape[1] // spread.smallest_chunk
                chunks = max(chunks, min(FEWEST_CHUNKS, most))
        run = _over_selected if looped else _over_sequence
        sums = run(x_BSD, w_VD, summed, chunks)
        if sums.of_hidden is not None:
            whole = None
            if sums.of_weight is not None:
                # Devices exchange it in the weights' type, like every other gradient.
                whole = sums.of_weight.to(w_VD.dtype).sum(dim=0)
                whole = spread.cut_gradient(whole if spread.vocabulary_first else whole.t())
            ctx.save_for_backward(sums.of_hidden, whole)
        terms = [term.sum() for term in sums.terms]
        ctx.mark_non_differentiable(sums.each, *terms)
        return sums.rows.sum(), sums.each, *terms

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        of_hidden, of_weight = ctx.saved_tensors
        whole = None if of_weight is None else grad * of_weight
        return grad * of_hidden, whole, None


def _over_sequence(x_BSD: Tensor, w_VD: Tensor, summed: Summed, chunks: int) -> _Sums:
    """Sum over parts of the sequence, one after the other."""
    in_order = summed.spread.in_order
    length = -(-x_BSD.shape[1] // chunks)
    rows = torch.zeros(x_BSD.shape[0], dtype=torch.float32, device=x_BSD.device)
    losses: list[Tensor] = []
    terms: list[Tensor] = []
    grads_x: list[Tensor] = []
    grad_w: Tensor | None = None
    for start in range(0, x_BSD.shape[1], length):
        part = slice(start, start + length)
        x_BCD = x_BSD[:, part]
        if grad_w is not None:
            x_BCD, grad_w = in_order(x_BCD, grad_w)
        elif grads_x:
            x_BCD, grads_x[-1] = in_order(x_BCD, grads_x[-1])
        chunk = summed.compute(x_BCD, w_VD, [t[:, part] for t in summed.tokens], summed.shared)
        rows = rows + chunk.losses.sum(dim=1)
        losses.append(chunk.losses)
        more = chunk.terms
        terms = [a + b for a, b in zip(terms, more, strict=True)] if terms else more
        if chunk.of_hidden is not None:
            grads_x.append(chunk.of_hidden)
        if (of_weight := chunk.of_weight) is not None:
            grad_w = of_weight.float() if grad_w is None else grad_w + of_weight
    of_hidden = torch.cat(grads_x, dim=1) if grads_x else None
    return _Sums(rows, torch.cat(losses, dim=1), terms, of_hidden, grad_w)


def _over_selected(x_BSD: Tensor, w_VD: Tensor, summed: Summed, chunks: int) -> _Sums:
    """Sum over the tokens that carry loss, in a loop that starts where they start."""
    spread, needs, device = summed.spread, summed.needs, x_BSD.device
    assert spread.loop is not None
    selection = Selection(summed.tokens[0] != 0, spread.groups, chunks, spread.rows)
    x_NGCD = selection.take(x_BSD)
    weights, *others = (selection.take(values) for values in summed.tokens)
    weights = torch.where(selection.padding, 0.0, weights)
    terms, gradients = 1 + summed.terms, 1 if needs.of_weight else 0
    # Inside the loop the weight is read by every chunk: devices gather it once, before.
    whole = [spread.gather(w) for w in (w_VD, *summed.shared)]
    zeros = [torch.zeros(spread.groups, dtype=torch.float32, device=device) for _ in range(terms)]
    if gradients:
        shape = w_VD.shape if spread.vocabulary_first else w_VD.t().shape
        total = torch.zeros((spread.groups, *shape), dtype=torch.float32, device=device)
        zeros.append(spread.keep(total))

    def body(carry: Sequence[Tensor], xs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        sums, (w_VD, *shared) = carry[: len(zeros)], map(spread.gather, carry[len(zeros) :])
        x_GCD, *tokens = xs
        chunk = summed.compute(x_GCD, w_VD, tokens, shared)
        more = [chunk.losses.sum(dim=1), *chunk.terms]
        if chunk.of_weight is not None:
            more.append(chunk.of_weight)
        sums = [total + each for total, each in zip(sums, more, strict=True)]
        of_hidden = [] if chunk.of_hidden is None else [chunk.of_hidden]
        return [*sums, w_VD, *shared], [chunk.losses, *of_hidden]

    carried, (losses, *of_hidden) = spread.loop(
        body, [*zeros, *whole], [x_NGCD, weights, *others], selection.first
    )
    rows, *more = carried[:terms]
    return _Sums(
        rows,
        selection.put_back(losses),
        more,
        selection.put_back(of_hidden[0]) if of_hidden else None,
        carried[terms] if gradients else None,
    )
