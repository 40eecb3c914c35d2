"""The attention kernels as operations of the step's graph, and the core that uses them.

In the graph and in the module that TorchTPU lowers, a kernel is one operation, which has a name and
no content. `bodies` gives it for a platform. So the module for a TPU and the one that a CPU
executes differ in their kernels only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchprime.attention_kernels.blocks import blocks_for
from torchprime.attention_kernels.kernel_parts import Inputs, KernelOptions, head_shape, in_rows
from torchprime.attention_kernels.modules import BACKWARD, FORWARD, kernel_module
from torchprime.attention_kernels.segments import with_first_positions
from torchprime.torch_native.tpu.collectives import defined

Given = tuple[tuple[tuple[int, ...], torch.dtype], ...]
# jax's names of the types.
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.int32: "int32"}


@dataclass(frozen=True)
class Kernel:
    """A kernel for arrays of some shapes.

    Attributes:
        kind: FORWARD or BACKWARD.
        given: shape and type of each array.
    """

    kind: str
    options: KernelOptions
    given: Given

    @property
    def results(self) -> Given:
        """Shape and type of each result."""
        q, k, v, *_ = self.given
        if self.kind == BACKWARD:
            return q, k, v
        (shape, dtype), (B, H, S, _) = q, q[0]
        return (head_shape(*shape), dtype), ((B, H, S), torch.float32)

    def module(self, platform: str) -> str:
        """Return the kernel as a module for a platform."""
        given = [(shape, NAMES[dtype]) for shape, dtype in self.given]
        return kernel_module(self.kind, self.options, given, platform)


# Kernels by name, for the operations that name them.
KERNELS: dict[str, Kernel] = {}


def _fake(name: str, given: list[Tensor]) -> Any:
    return [given[0].new_empty(shape, dtype=dtype) for shape, dtype in KERNELS[name].results]


KERNEL = defined("kernel", "str name, Tensor[] given", "Tensor[]", _fake)


def call(kind: str, options: KernelOptions, *given: Tensor) -> list[Tensor]:
    """Return a kernel's results."""
    kernel = Kernel(kind, options, tuple((tuple(x.shape), x.dtype) for x in given))
    known = {each: name for name, each in KERNELS.items()}
    name = known.get(kernel, f"{kind}.{len(KERNELS)}")
    KERNELS[name] = kernel
    return list(KERNEL(name, [x.contiguous() for x in given]))


def bodies(text: str, platform: str) -> dict[str, str]:
    """Return, by name, the module of each kernel that a program's text names."""
    return {name: kernel.module(platform) for name, kernel in KERNELS.items() if name in text}


class _Attend(torch.autograd.Function):
    """Attention whose backward is the other kernel."""

    @staticmethod
    def forward(ctx: Any, options: KernelOptions, *given: Tensor) -> Tensor:
        out, log_sum_exp = call(FORWARD, options, *given)
        ctx.options = options
        ctx.save_for_backward(*given, out, log_sum_exp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = call(BACKWARD, ctx.options, *ctx.saved_tensors, grad)
        return None, *found, None


class KernelAttention(nn.Module):
    """Causal attention within segments by the kernels, for the heads that a chip has.

    Args:
        window: positions that a query sees, its own among them; None for all.
        softcap: of the scores, before the mask; None for none.
    """

    def __init__(
        self, head_dim: int, window: int | None = None, softcap: float | None = None
    ) -> None:
        super().__init__()
        self.head_dim, self.scale = head_dim, head_dim**-0.5
        self.window, self.softcap = window, softcap

    def prepare(self, segment_ids: Tensor) -> Tensor:
        """Return int32 [B, 2, S] for segment_ids [B, S]: the ids, and for each position the first
        one with its id."""
        return with_first_positions(segment_ids)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, prepared: Tensor) -> Tensor:
        """Return [B, H, S, h] for q [B, H, S, h] and k, v [B, K, S, h]."""
        blocks = blocks_for(q.shape[2], self.head_dim, q.element_size())
        rows = in_rows(self.head_dim)
        given = Inputs(q * self.scale, k, v.transpose(1, 2).flatten(2) if rows else v, prepared)
        mixed: Any = _Attend.apply(KernelOptions(blocks, self.window, self.softcap), *given)
        return mixed.unflatten(2, (-1, self.head_dim)).transpose(1, 2) if rows else mixed
