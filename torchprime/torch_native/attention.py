"""Attention on CUDA: flash-attn or FlexAttention, or the reference core.

Neither of the first two stores the [S, S] scores in memory, and both skip the blocks that the
causal mask, the window or the segments exclude. flash-attn takes the begins of segments in the
concatenated blocks; FlexAttention takes a block mask. Either is made once per forward, in
`prepare`, and shared by all layers.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from torchprime.config.sections.model import SPLASH_KERNELS
from torchprime.errors import ConfigError
from torchprime.installed import installed_version
from torchprime.models.attention import ReferenceAttention, softcapped
from torchprime.models.decoder import CausalLM, replace_attention_cores

# flash-attn's kernels are for this generation of GPUs and later ones.
FLASH_CAPABILITY = (8, 0)


class FlexAttention(nn.Module):
    """FlexAttention with the core's two methods; compiled on CUDA."""

    def __init__(
        self, head_dim: int, window: int | None, softcap: float | None = None, *, compiled: bool
    ) -> None:
        super().__init__()
        self.scale, self.window = head_dim**-0.5, window
        self.modify = None if softcap is None else partial(_capped, softcap)
        self.unhooked = self.modify is not None and not compiled
        self.attend: Any = torch.compile(flex_attention) if compiled else flex_attention
        self.make_mask: Any = torch.compile(create_block_mask) if compiled else create_block_mask

    def prepare(self, segment_ids: Tensor) -> BlockMask:
        """Return the blocks of scores that are computed, for all heads, from segment_ids [B, S]."""
        window = self.window

        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (q >= k) & (segment_ids[b, q] == segment_ids[b, k])
            return seen if window is None else seen & (q - k < window)

        B, S = segment_ids.shape
        return self.make_mask(visible, B, None, S, S, device=segment_ids.device)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: BlockMask) -> Tensor:
        """Return [B, H, S, h] for q [B, H, S, h] and k, v [B, K, S, h]."""
        grouped = q.shape[1] != k.shape[1]
        with _unhooked() if self.unhooked else nullcontext():
            return self.attend(
                q, k, v, self.modify, block_mask=prepared, scale=self.scale, enable_gqa=grouped
            )


def _capped(softcap: float, score: Tensor, *_: Tensor) -> Tensor:
    """Return the score that FlexAttention uses instead of this one."""
    return softcapped(score, softcap)


def _unhooked() -> AbstractContextManager[Any]:
    """Return a context in which autograd keeps tensors itself, for FlexAttention that is not
    compiled. It traces the derivative of a score's function while a layer with remat runs, whose
    hooks would put the result of a recomputation into the trace as a constant."""
    return torch.autograd.graph.saved_tensors_hooks(_unchanged, _unchanged)


def _unchanged(saved: Tensor) -> Tensor:
    return saved


class FlashAttention(nn.Module):
    """flash-attn's kernel for sequences of different lengths, with the core's two methods. It has
    no soft-cap.

    Args:
        attend: `flash_attn.flash_attn_varlen_func`.
    """

    def __init__(self, head_dim: int, window: int | None, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.scale, self.attend = head_dim**-0.5, attend
        # Its window counts positions before and after the query; ours counts the query too.
        self.window = (-1, -1) if window is None else (window - 1, 0)

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """Return int32 [segments + 1] for segment_ids [B, S]: the begin of each segment in the B *
        S concatenated tokens, and the end of the last. A block's padding is a segment like any
        other. Their number is known on the device only: the host waits for it, once per forward."""
        begins = torch.ones_like(segment_ids, dtype=torch.bool)
        begins[:, 1:] = segment_ids[:, 1:] != segment_ids[:, :-1]
        starts = begins.flatten().nonzero().flatten()
        end = starts.new_tensor([segment_ids.numel()])
        offsets = torch.cat([starts, end]).to(torch.int32)
        # Each batch has another number of them, which must not recompile the layers.
        torch._dynamo.maybe_mark_dynamic(offsets, 0)
        return offsets

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """Return [B, H, S, h] for q [B, H, S, h] and k, v [B, K, S, h]."""
        B, _, S, _ = q.shape
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # [B * S, heads, h]
        out = self.attend(
            q,
            k,
            v,
            cu_seqlens_q=prepared,
            cu_seqlens_k=prepared,
            max_seqlen_q=S,  # an upper bound, known without a read from the device
            max_seqlen_k=S,
            softmax_scale=self.scale,
            causal=True,
            window_size=self.window,
        )
        return out.unflatten(0, (B, S)).transpose(1, 2)


# Choosing -----------------------------------------------------------------------------------------


class Flash(NamedTuple):
    """The result of the search for flash-attn."""

    attend: Callable[..., Tensor] | None  # flash_attn_varlen_func, if it can be used
    told: str  # its version, or the reason why it can't be used


def find_flash() -> Flash:
    """Look for flash-attn. A build for one version of torch may not load in another."""
    version = installed_version("flash-attn")
    if version is None:
        return Flash(None, "flash-attn is not installed")
    try:
        return Flash(import_module("flash_attn").flash_attn_varlen_func, f"flash-attn {version}")
    except (ImportError, OSError, AttributeError) as error:
        return Flash(None, f"flash-attn {version} cannot be loaded ({error})")


def choose_kernel(
    wanted: str,
    device_type: str,
    *,
    full_precision: bool,
    capability: tuple[int, int] | None,
    flash: Flash,
) -> tuple[str, str]:
    """Resolve `auto` and refuse a kernel that is not available.

    Args:
        capability: of the GPU, (major, minor).

    Returns:
        The kernel's name and why.
    """
    obstacle = _flash_obstacle(device_type, full_precision, capability, flash)
    if wanted in SPLASH_KERNELS:
        raise ConfigError(
            f"model.attention_kernel={wanted} runs on TPUs only, and this run is on "
            f"{device_type}; use auto, flash, flex or reference."
        )
    if wanted == "flex" and device_type == "cpu" and not flex_trains_on_cpu():
        raise ConfigError(
            f"model.attention_kernel=flex: torch {torch.__version__} has no backward for it on the "
            "CPU. Use auto or reference."
        )
    if wanted == "flash" and obstacle:
        raise ConfigError(
            f"model.attention_kernel=flash: {obstacle}. Use auto, flex or reference, or install "
            "flash-attn for this torch (pip install flash-attn --no-build-isolation)."
        )
    if wanted != "auto":
        return wanted, "as configured"
    if device_type != "cuda":
        return "reference", f"auto on {device_type}"
    if obstacle:
        return "flex", f"auto on CUDA: {obstacle}"
    return "flash", f"auto on CUDA: {flash.told}"


def kernel_for_softcap(
    wanted: str, chosen: tuple[str, str], softcap: float | None
) -> tuple[str, str]:
    """Return the kernel and the reason for a model whose scores may have a soft-cap, which
    flash-attn is not given.

    Args:
        wanted: the kernel that the config names.
        chosen: what `choose_kernel` returned.

    Raises:
        ConfigError: the config names flash-attn for a model with a soft-cap.
    """
    if softcap is None or chosen[0] != "flash":
        return chosen
    obstacle = "the model caps attention's scores (attn_logit_softcapping), flash-attn is not used"
    if wanted == "flash":
        raise ConfigError(
            f"model.attention_kernel=flash: {obstacle} for that. Use auto, flex or reference."
        )
    return "flex", f"auto on CUDA: {obstacle}"


def flex_trains_on_cpu() -> bool:
    """Return True if this torch differentiates FlexAttention on the CPU: 2.9 does, 2.13 refuses."""
    q = torch.zeros(1, 1, 1, 16, requires_grad=True)
    try:
        attended: Any = flex_attention(q, q, q)
        attended.sum().backward()
    except NotImplementedError:
        return False
    return True


def _flash_obstacle(
    device_type: str, full_precision: bool, capability: tuple[int, int] | None, flash: Flash
) -> str | None:
    if device_type != "cuda":
        return f"it runs on CUDA only, and this run is on {device_type}"
    if flash.attend is None:
        return flash.told
    if full_precision:
        return "flash-attn computes in bfloat16, and this run is in float32"
    if capability is not None and capability < FLASH_CAPABILITY:
        needed, has = (".".join(map(str, each)) for each in (FLASH_CAPABILITY, capability))
        return f"flash-attn needs compute capability {needed}, and this GPU has {has}"
    return None


def inject_attention(model: CausalLM, kernel: str, device_type: str) -> None:
    """Put the chosen kernel into every layer."""
    if kernel == "flash":
        attend = find_flash().attend
        # choose_kernel found it, kernel_for_softcap chose another kernel
        assert attend is not None and model.architecture.attention_softcap is None
        replace_attention_cores(model, lambda size, window, _: FlashAttention(size, window, attend))
    elif kernel == "flex":
        replace_attention_cores(model, partial(FlexAttention, compiled=device_type == "cuda"))
    else:
        replace_attention_cores(model, ReferenceAttention)
