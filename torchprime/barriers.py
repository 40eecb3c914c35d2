"""Barriers for values and gradients that a compiler would compute several times.

A compiler may compute a cheap value again in every operation that reads it. A TPU's does so inside
matrix products, for each block of a product's result. Behind a barrier it is written once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Returns the tensors unchanged. All of them are computed before anything that reads one.
Barrier = Callable[[list[Tensor]], list[Tensor]]


class _Stored(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, barrier: Barrier, x: Tensor) -> Tensor:  # type: ignore[override]
        (x,) = barrier([x])
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


class _GradientsStored(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, barrier: Barrier, *xs: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.barrier = barrier
        return tuple(x.view_as(x) for x in xs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return None, *ctx.barrier(list(grads))


def stored(barrier: Barrier, x: Tensor) -> Tensor:
    """Return a tensor behind a barrier; its gradient passes."""
    return _Stored.apply(barrier, x)  # type: ignore[no-any-return]


def gradients_stored(barrier: Barrier, *xs: Tensor) -> tuple[Tensor, ...]:
    """Return tensors whose gradients are behind one barrier."""
    return _GradientsStored.apply(barrier, *xs)  # type: ignore[no-any-return]
