"""The attention core: it maps queries, keys and values to mixed values, per segment.

A backend replaces the core by one with the same two methods (a kernel); the rest of the model is
unchanged. `prepare` runs once per forward, outside the layers, and computes from the segment ids
whatever the core needs in every layer; `forward` runs in every layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

# Query rows are computed in at most this many groups of at least this many rows. More groups would
# save more of the scores above the diagonal, but their products are too small to be fast.
GROUPS = 4
SMALLEST_GROUP = 128

# Makes the core of a layer from its head size, its window and its soft-cap.
MakeCore = Callable[[int, int | None, float | None], nn.Module]

# Shape suffixes: B batch, S sequence, H heads, K kv heads, h head size.


def softcapped(values: Tensor, cap: float | None) -> Tensor:
    """Return cap * tanh(values / cap), which lies between -cap and cap (Gemma 2,
    arXiv:2408.00118); the values unchanged if there is no cap."""
    return values if cap is None else cap * torch.tanh(values / cap)


class ReferenceAttention(nn.Module):
    """Causal attention within segments, in a few matmuls, on every device.

    A query attends to keys of its own segment id, at or before its own position in the block, and
    within the window if there is one. Padding (segment 0) attends to padding, so no row of the
    softmax is ever empty and no NaN can arise.

    Args:
        softcap: of the scores, before the mask; None for none.
    """

    def __init__(
        self, head_dim: int, window: int | None = None, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.window, self.softcap = window, softcap

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """Return an additive fp32 mask [B, 1, 1, S, S] for segment_ids [B, S]: 0 where a key is
        attended to."""
        place = torch.arange(segment_ids.shape[1], device=segment_ids.device, dtype=torch.int32)
        distance = place[:, None] - place[None, :]
        visible = distance >= 0
        if self.window is not None:
            visible = visible & (distance < self.window)
        visible = visible & (segment_ids[:, :, None] == segment_ids[:, None, :])
        # A large finite number, not -inf: exp underflows to exactly 0 and gradients stay finite.
        mask = torch.where(visible, 0.0, -1e30).to(torch.float32)
        return mask[:, None, None]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """Return [B, H, S, h] in q's dtype for q [B, H, S, h] and k, v [B, K, S, h]; softmax in
        fp32.

        Queries are split into a few groups of rows, each computed with only the keys that causality
        and window allow: up to three eighths of the [S, S] scores are never computed.
        """
        B, H, S, h = q.shape
        K = k.shape[1]
        q = (q * self.scale).view(B, K, H // K, S, h)
        k, v = k[:, :, None], v[:, :, None]
        rows = max(SMALLEST_GROUP, -(-S // GROUPS))
        mixed = []
        for start in range(0, S, rows):
            stop = min(start + rows, S)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            scores = torch.matmul(q[..., start:stop, :], k[..., first:stop, :].transpose(-1, -2))
            scores = softcapped(scores.float(), self.softcap)
            scores = scores + prepared[..., start:stop, first:stop]
            probabilities = torch.softmax(scores, dim=-1).to(v.dtype)
            mixed.append(torch.matmul(probabilities, v[..., first:stop, :]))
        return torch.cat(mixed, dim=-2).reshape(B, H, S, h)
