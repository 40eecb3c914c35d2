"""Attention on CUDA: FlexAttention with a block mask made of the segments, or the reference core.

FlexAttention never makes the [S, S] scores in memory and skips blocks that the causal mask, the
window or the segments rule out. The block mask is made once per forward and shared by all layers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torchprime.errors import ConfigError
from torchprime.models.attention import ReferenceAttention
from torchprime.models.decoder import CausalLM, replace_attention_cores


class FlexAttention(nn.Module):
    """FlexAttention behind the core's two methods; compiled where it pays, on CUDA."""

    def __init__(self, head_dim: int, window: int | None, compiled: bool) -> None:
        super().__init__()
        self.scale, self.window = head_dim**-0.5, window
        self.attend: Any = torch.compile(flex_attention) if compiled else flex_attention
        self.make_mask: Any = torch.compile(create_block_mask) if compiled else create_block_mask

    def prepare(self, segment_ids: Tensor) -> BlockMask:
        """segment_ids [B, S] -> which blocks of scores are computed, for all heads."""
        window = self.window

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (q >= k) & (segment_ids[b, q] == segment_ids[b, k])
            return seen if window is None else seen & (q - k < window)

        B, S = segment_ids.shape
        return self.make_mask(visible, B, None, S, S, device=segment_ids.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: BlockMask) -> Tensor:
        """q [B, H, S, h]; k, v [B, K, S, h] -> [B, H, S, h]."""
        grouped = q.shape[1] != k.shape[1]
        return self.attend(q, k, v, block_mask=prepared, scale=self.scale, enable_gqa=grouped)


def choose_kernel(wanted: str, device: torch.device) -> tuple[str, str]:
    """Resolve `auto` and refuse a kernel that is not there.

    Returns:
        The kernel's name and why.
    """
    if wanted == "splash":
        raise ConfigError(
            "model.attention_kernel=splash runs on TPUs only, and this run is on "
            f"{device.type}; use auto, flex or reference."
        )
    if wanted != "auto":
        return wanted, "as configured"
    if device.type == "cuda":
        return "flex", "auto on CUDA"
    return "reference", f"auto on {device.type}"


def inject_attention(model: CausalLM, kernel: str, device: torch.device) -> None:
    """Put the chosen kernel into every layer."""
    if kernel == "flex":
        compiled = device.type == "cuda"
        replace_attention_cores(model, lambda size, window: FlexAttention(size, window, compiled))
    else:
        replace_attention_cores(model, ReferenceAttention)
