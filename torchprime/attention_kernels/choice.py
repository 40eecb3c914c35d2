"""The choice of an attention kernel on a runtime for TPUs; jax is not needed for it."""

from __future__ import annotations

from typing import NamedTuple

from torchprime.attention_kernels.blocks import KERNEL_MULTIPLE
from torchprime.config.sections.model import SPLASH, SPLASH_BY_JAX, SPLASH_KERNELS
from torchprime.errors import ConfigError


class Runtime(NamedTuple):
    """A runtime for TPUs.

    Attributes:
        name: in messages.
        device: the kind of its devices: TPU, or another that has no kernels.
        calls_jax: it calls jax's own kernels too.
    """

    name: str
    device: str
    calls_jax: bool


def choose_kernel(wanted: str, block_size: int, runtime: Runtime) -> tuple[str, str]:
    """Resolve `auto` and refuse a kernel that the device or the sequence does not allow.

    Returns:
        The kernel's name and why.
    """
    _, device, _ = runtime
    fits = block_size % KERNEL_MULTIPLE == 0
    _refuse_others(wanted, block_size, runtime)
    if wanted != "auto":
        return wanted, "as configured"
    if device != "TPU":
        return "reference", f"auto on {device}"
    if not fits:
        return "reference", f"auto: block_size={block_size} is no multiple of {KERNEL_MULTIPLE}"
    return SPLASH, "auto on TPU"


def _refuse_others(wanted: str, block_size: int, runtime: Runtime) -> None:
    name, device, calls_jax = runtime
    on_tpu = wanted in SPLASH_KERNELS
    if on_tpu and device != "TPU":
        raise ConfigError(
            f"model.attention_kernel={wanted} runs on TPUs only, and this run is on "
            f"{device}; use auto or reference."
        )
    if wanted == SPLASH_BY_JAX and not calls_jax:
        raise ConfigError(
            f"model.attention_kernel={wanted} is called by PyTorch/XLA only, and this run is on "
            f"{name}; use auto, splash or reference."
        )
    if wanted in ("flash", "flex"):
        raise ConfigError(
            f"model.attention_kernel={wanted} is a kernel of the GPU backend, and this run is on "
            f"{name}; use auto, splash or reference."
        )
    if on_tpu and block_size % KERNEL_MULTIPLE:
        raise ConfigError(
            f"model.attention_kernel={wanted} works in tiles of {KERNEL_MULTIPLE} positions, but "
            f"dataset.block_size={block_size} is not a multiple. Change it, or use auto."
        )
