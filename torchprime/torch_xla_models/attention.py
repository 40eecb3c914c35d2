"""Attention on a TPU: torch_xla's splash kernel with segment ids, or the reference core.

Splash attention (Pallas) never makes the [S, S] scores in memory and skips blocks that the causal
mask or the segments rule out. It works per device on its shard of batch and heads, so the mesh is
named in its config. It wants as many kv heads as heads.
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

# Larger blocks do not fit VMEM on v5e at a sequence of 8192; these fit v5e, v5p and v6e.
BLOCK = 1024
COMPUTE_BLOCK = 512


class SplashAttention(nn.Module):
    """The splash kernel behind the core's two methods."""

    def __init__(
        self, head_dim: int, window: int | None, mesh: xs.Mesh, batch_axes: tuple[str, ...]
    ) -> None:
        super().__init__()
        self.scale = head_dim**-0.5
        self.window = window
        # torch_xla annotates the specs as one-element tuples; any PartitionSpec works.
        heads: Any = (batch_axes, "tensor", None, None)
        rows: Any = (batch_axes, None)
        self.config = SplashAttentionConfig(
            sa_block_q=BLOCK,
            sa_block_kv=BLOCK,
            sa_block_kv_compute=COMPUTE_BLOCK,
            sa_block_q_dkv=BLOCK,
            sa_block_kv_dkv=BLOCK,
            sa_block_kv_dkv_compute=COMPUTE_BLOCK,
            sa_block_q_dq=BLOCK,
            sa_block_kv_dq=BLOCK,
            mesh=str(mesh),
            qkv_partition_spec=heads,
            segment_ids_partition_spec=rows,
            attentiontype_local_sliding=window is not None,
            # The kernel's window counts positions back from the query; ours counts the query too.
            slide_window_size=None if window is None else window - 1,
        ).to_json()

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """The kernel reads segment ids [B, S] as they are."""
        return segment_ids

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """q [B, H, S, h]; k, v [B, K, S, h] -> [B, H, S, h]."""
        groups = q.shape[1] // k.shape[1]
        if groups > 1:
            k = k.repeat_interleave(groups, dim=1)
            v = v.repeat_interleave(groups, dim=1)
        out = splash_attention(q * self.scale, k, v, self.config, prepared, True, None)
        return out.to(v.dtype)


def choose_kernel(wanted: str) -> tuple[str, str]:
    """Resolve `auto` and refuse a kernel the device does not have.

    Returns:
        The kernel's name and a line that says why.
    """
    on_tpu = xr.device_type() == "TPU"
    if wanted == "splash" and not on_tpu:
        raise ConfigError(
            "model.attention_kernel=splash runs on TPUs only, and this run is on "
            f"{xr.device_type()}; use auto or reference."
        )
    if wanted == "auto":
        kernel = "splash" if on_tpu else "reference"
        return kernel, f"attention kernel: {kernel} (auto on {xr.device_type()})"
    return wanted, f"attention kernel: {wanted} (as configured)"


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
