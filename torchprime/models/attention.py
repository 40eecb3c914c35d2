"""The attention core: what turns queries, keys and values into values mixed per segment.

A backend replaces the core by one of the same two methods (a kernel); the rest of the model does
not know. `prepare` runs once per forward, outside the layers, and makes of the segment ids whatever
the core wants to see in every layer; `forward` runs in every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Rows of queries are computed in at most this many groups of at least this many rows: more would
# save more of the scores above the diagonal, in products too small to be fast.
GROUPS = 4
SMALLEST_GROUP = 128

# Shape suffixes: B batch, S sequence, H heads, K kv heads, h head size.


class ReferenceAttention(nn.Module):
    """Causal attention within segments, in a few matmuls, on every device.

    A query sees keys of its own segment id, at or before its own place in the block, and within the
    window if there is one. Padding (segment 0) sees padding, so no row of the softmax is ever empty
    and no NaN can arise.
    """

    def __init__(self, head_dim: int, window: int | None = None) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.window = window

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """segment_ids [B, S] -> additive fp32 mask [B, 1, 1, S, S], 0 where a key is seen."""
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
        """q [B, H, S, h]; k, v [B, K, S, h] -> [B, H, S, h], in q's dtype; softmax in fp32.

        Queries go in a few groups of rows, each against the keys that causality and window leave
        it: of the [S, S] scores up to three eighths are never computed.
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
            scores = scores.float() + prepared[..., start:stop, first:stop]
            probabilities = torch.softmax(scores, dim=-1).to(v.dtype)
            mixed.append(torch.matmul(probabilities, v[..., first:stop, :]))
        return torch.cat(mixed, dim=-2).reshape(B, H, S, h)
