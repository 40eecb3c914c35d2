"""Attention on a TPU: torch_xla's splash kernel with segment ids, or the reference core.

Splash attention (Pallas) never stores the [S, S] scores in memory and skips blocks that the causal
mask or the segments exclude. It works per device on its shard of batch and heads, so the mesh is
named in its config. It requires as many kv heads as heads.
"""

from __future__ import annotations

from typing import Any

import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch_xla.experimental.splash_attention import SplashAttentionConfig, splash_attention

from torchprime.errors import ConfigError
from torchprime.models.attention import ReferenceAttention
from torchprime.models.decoder import CausalLM, replace_attention_cores

# 2048 does not fit VMEM on v5e at a sequence of 8192, though it does on v6e; these fit v5p too.
LARGEST_BLOCK = 1024
LARGEST_COMPUTE_BLOCK = 512
# The kernel works in tiles of this many positions; the sequence must be a multiple.
KERNEL_MULTIPLE = 128


def kernel_blocks(length: int) -> tuple[int, int]:
    """Return block and compute block for a sequence: the largest multiples of a tile that divide
    evenly.

    Examples:
        >>> kernel_blocks(8192), kernel_blocks(1536), kernel_blocks(384)
        ((1024, 512), (768, 384), (384, 384))
    """
    block = _largest_divisor(length, LARGEST_BLOCK)
    return block, _largest_divisor(block, LARGEST_COMPUTE_BLOCK)


def _largest_divisor(length: int, limit: int) -> int:
    tiles = range(KERNEL_MULTIPLE, min(length, limit) + 1, KERNEL_MULTIPLE)
    return max(tile for tile in tiles if length % tile == 0)


class SplashAttention(nn.Module):
    """The splash kernel with the core's two methods."""

    def __init__(
        self, head_dim: int, window: int | None, mesh: xs.Mesh, batch_axes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.window = window
        self.mesh, self.batch_axes = mesh, batch_axes

    def config(self, length: int) -> str:
        """Return torch_xla's settings of the kernel for a sequence of this length."""
        block, compute = kernel_blocks(length)
        # torch_xla annotates the specs as one-element tuples; any PartitionSpec works.
        heads: Any = (self.batch_axes, "tensor", None, None)
        rows: Any = (self.batch_axes, None)
        return SplashAttentionConfig(
            sa_block_q=block,
            sa_block_kv=block,
            sa_block_kv_compute=compute,
            sa_block_q_dkv=block,
            sa_block_kv_dkv=block,
            sa_block_kv_dkv_compute=compute,
            sa_block_q_dq=block,
            sa_block_kv_dq=block,
            mesh=str(self.mesh),
            qkv_partition_spec=heads,
            segment_ids_partition_spec=rows,
            attentiontype_local_sliding=self.window is not None,
            # The kernel's window counts positions back from the query; ours counts the query too.
            slide_window_size=None if self.window is None else self.window - 1,
        ).to_json()

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """Return the segment ids [B, S] unchanged, as the kernel reads them."""
        return segment_ids

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """Return [B, H, S, h] for q [B, H, S, h] and k, v [B, K, S, h]."""
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
        out = splash_attention(q * self.scale, k, v, self.config(q.shape[2]), prepared, True, None)
        return out.to(v.dtype)


def choose_kernel(wanted: str, block_size: int) -> tuple[str, str]:
    """Resolve `auto` and refuse a kernel that the device or the sequence does not allow.

    Returns:
        The kernel's name and why.
    """
    device = xr.device_type()
    fits = block_size % KERNEL_MULTIPLE == 0
    if wanted == "splash" and device != "TPU":
        raise ConfigError(
            "model.attention_kernel=splash runs on TPUs only, and this run is on "
            f"{device}; use auto or reference."
        )
    if wanted in ("flash", "flex"):
        raise ConfigError(
            f"model.attention_kernel={wanted} is a kernel of the GPU backend, and this run is on "
            "XLA; use auto, splash or reference."
        )
    if wanted == "splash" and not fits:
        raise ConfigError(
            f"model.attention_kernel=splash works in tiles of {KERNEL_MULTIPLE} positions, but "
            f"dataset.block_size={block_size} is not a multiple. Change it, or use auto."
        )
    if wanted != "auto":
        return wanted, "as configured"
    if device != "TPU":
        return "reference", f"auto on {device}"
    if not fits:
        return "reference", f"auto: block_size={block_size} is no multiple of {KERNEL_MULTIPLE}"
    return "splash", "auto on TPU"


def inject_attention(
    model: CausalLM, kernel: str, mesh: xs.Mesh, batch_axes: tuple[str, ...]
) -> None:
    """Put the chosen kernel into every layer."""
    if kernel == "splash":
        replace_attention_cores(
            model, lambda head_dim, window: SplashAttention(head_dim, window, mesh, batch_axes)
        )
    else:
        replace_attention_cores(model, ReferenceAttention)
