"""The order of tokens in which those that carry loss come last, in equal chunks.

A loop over the chunks that starts at `first` then computes the logits of tokens that carry loss,
and of few others. Shapes do not depend on the data, only the loop's start does. Rows of a group
share their chunks: they are on one device, so no token moves to another device.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Shape suffixes: B batch, S sequence, G groups of rows, T tokens of a group, P tokens of a group
# with padding, N chunks, C tokens of a chunk.


# (values [G, T, D], index [G, K]) -> the values of each group at its index, [G, K, D].
Rows = Callable[[Tensor, Tensor], Tensor]


def rows_of(values: Tensor, index: Tensor) -> Tensor:
    """Return values [G, T, D] at an index [G, K], as [G, K, D]."""
    group = torch.arange(len(values), device=values.device)[:, None]
    return values[group, index.long()]


class Selection:
    """Tokens sorted by whether they carry loss.

    Args:
        counted_BS: bool [B, S], true for a token that carries loss; groups divide B.
        groups: numbers of groups of rows, in the order of the rows.
        chunks: number of chunks.
        rows: what `rows_of` does.

    Attributes:
        first: the first chunk with a token that carries loss in any group, an int64 scalar; the
            number of chunks if there is none.
        padding: bool [N, G, C], true for a slot without a token.
    """

    def __init__(self, counted_BS: Tensor, groups: int, chunks: int, rows: Rows = rows_of) -> None:
        self.shape, self.rows = counted_BS.shape, rows
        counted = counted_BS.reshape(groups, -1)
        tokens = counted.shape[1]
        length = -(-tokens // chunks)
        self.chunked = chunks, groups, length
        free = chunks * length - tokens  # slots without a token, before all tokens
        number, other = counted.int(), (~counted).int()
        needed = number.sum(dim=1, keepdim=True)
        # Each token's slot: those that carry no loss, then those that do, each in their order.
        behind = tokens - needed + number.cumsum(dim=1) - 1
        self.slots_GT = free + torch.where(counted, behind, other.cumsum(dim=1) - 1)
        order = number.argsort(dim=1, stable=True)
        self.order_GP = torch.cat([order[:, :1].expand(-1, free), order], dim=1)
        slot = torch.arange(chunks * length, device=counted.device)
        self.padding = self._cut((slot < free).expand(groups, -1))
        most = needed.max().long()
        self.first = chunks - torch.div(most + length - 1, length, rounding_mode="floor")

    def take(self, values: Tensor) -> Tensor:
        """Return the tokens' values [B, S, ...] as [N, G, C, ...]. A padding slot has those of some
        token."""
        values_GT = values.reshape(len(self.order_GP), -1, *values.shape[2:])
        return self._cut(self._at(values_GT, self.order_GP))

    def put_back(self, values: Tensor) -> Tensor:
        """Return values [N, G, C, ...] as [B, S, ...]."""
        together = values.transpose(0, 1).flatten(1, 2)
        return self._at(together, self.slots_GT).reshape(*self.shape, *values.shape[3:])

    def _at(self, values: Tensor, index_GK: Tensor) -> Tensor:
        found = self.rows(values.reshape(*values.shape[:2], -1), index_GK)
        return found.reshape(*index_GK.shape, *values.shape[2:])

    def _cut(self, values_GP: Tensor) -> Tensor:
        chunks, groups, length = self.chunked
        return values_GP.reshape(groups, chunks, length, *values_GP.shape[2:]).transpose(0, 1)
