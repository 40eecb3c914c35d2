"""The attention core of a run on XLA: splash attention on a TPU, or the reference core."""

from __future__ import annotations

from typing import Any

import torch
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn

from torchprime.attention_kernels import choice
from torchprime.attention_kernels.blocks import KERNEL_MULTIPLE
from torchprime.config.sections.model import SPLASH_BY_JAX, SPLASH_KERNELS
from torchprime.models.attention import MakeCore, ReferenceAttention
from torchprime.models.decoder import CausalLM, replace_attention_cores
from torchprime.text.terminal import say
from torchprime.torch_xla_models.device_tensors import DeviceTensors


def choose_kernel(wanted: str, block_size: int) -> tuple[str, str]:
    """Resolve `auto` and refuse a kernel that the device or the sequence does not allow.

    Returns:
        The kernel's name and why.
    """
    runtime = choice.Runtime("XLA", str(xr.device_type()), calls_jax=True)
    return choice.choose_kernel(wanted, block_size, runtime)


def core_maker(kernel: str, mesh: xs.Mesh, batch_axes: tuple[str, ...]) -> MakeCore:
    """Return what makes a layer's attention core with the chosen kernel."""
    if kernel not in SPLASH_KERNELS:
        return ReferenceAttention
    # late: jax is imported only where it is needed
    from torchprime.torch_xla_models.splash.attention import Scores, SplashAttention

    def make(head_dim: int, window: int | None, softcap: float | None) -> nn.Module:
        by_jax, scores = kernel == SPLASH_BY_JAX, Scores(head_dim, window, softcap)
        return SplashAttention(scores, mesh, batch_axes, by_jax=by_jax)

    return make


def inject_attention(
    model: CausalLM, kernel: str, mesh: xs.Mesh, batch_axes: tuple[str, ...]
) -> None:
    """Put the chosen kernel into every layer."""
    replace_attention_cores(model, core_maker(kernel, mesh, batch_axes))


class KernelOrReference(nn.Module):
    """The attention core for prompts: the kernel at the lengths that it allows, or the reference
    core. Both occur (`generation.decode.bucket`, `row_lengths`)."""

    def __init__(self, kernel: nn.Module, reference: nn.Module) -> None:
        super().__init__()
        self.kernel, self.reference = kernel, reference

    def of(self, length: int) -> Any:
        """Return the core for this number of positions."""
        return self.reference if length % KERNEL_MULTIPLE else self.kernel

    def prepare(self, segment_ids: Tensor) -> Any:
        """Prepare segment_ids [B, S] for the core of their length."""
        return self.of(segment_ids.shape[1]).prepare(segment_ids)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Any) -> Tensor:
        """Return [B, H, S, h] for q [B, H, S, h] and k, v [B, K, S, h]."""
        return self.of(q.shape[2])(q, k, v, prepared)


def prompt_core_maker(make_kernel: MakeCore) -> MakeCore:
    """Return what makes the core that reads prompts, from what makes training's core."""
    if make_kernel is ReferenceAttention:
        return make_kernel

    def make(*given: Any) -> nn.Module:
        return KernelOrReference(make_kernel(*given), ReferenceAttention(*given))

    return make


def check_attention(
    model: CausalLM, kernel: str, dtype: torch.dtype, tensors: DeviceTensors, *, quiet: bool
) -> None:
    """Compare the kernel with the reference core on the devices, for each window of the model, and
    report the result. On the reference core, or if tensors hold no data, there is nothing to do.

    Raises:
        RuntimeSetupError: they differ by more than rounding.
    """
    if kernel not in SPLASH_KERNELS or not tensors.hold_data:
        return
    # late: jax is imported only where it is needed
    from torchprime.torch_xla_models.splash.self_check import Heads, check_kernel

    a = model.architecture
    heads = Heads(a.num_attention_heads, a.num_key_value_heads)
    cores: Any = model.model.preparers
    for core in cores:
        told = check_kernel(core, kernel, heads, dtype, tensors)
        if not quiet:
            say(f"  {told}")
