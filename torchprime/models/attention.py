"""The attention core: what turns queries, keys and values into values mixed per segment.

A backend replaces the core by one of the same two methods (a kernel); the rest of the model does not
know. `prepare` runs once per forward, outside the layers, and makes of the segment ids whatever the
core wants to see in every layer; `forward` runs in every layer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
        """segment_ids [B, S] -> additive mask [B, 1, 1, S, S] in fp32: 0 where a key may be seen."""
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
        """q [B, H, S, h]; k, v [B, K, S, h] -> [B, H, S, h], in q's dtype; softmax in fp32."""
        B, H, S, h = q.shape
        K = k.shape[1]
        q = (q * self.scale).view(B, K, H // K, S, h)
        scores = torch.matmul(q, k[:, :, None].transpose(-1, -2)).float() + prepared
        probabilities = torch.softmax(scores, dim=-1).to(v.dtype)
        return torch.matmul(probabilities, v[:, :, None]).reshape(B, H, S, h)
