"""Frozen linear layers whose weight is stored in int8 or NF4.

The weight is dequantized for each use, in the forward and again in the backward, so no more than
one layer's is in memory in full precision.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchprime.adapters import int8, nf4
from torchprime.adapters.spec import BaseType
from torchprime.errors import ConfigError


class QuantizedLinear(nn.Module):
    """A frozen linear layer; subclasses store its weight.

    The stored tensors are parameters without gradient, so that they are sharded, stacked and placed
    like other weights.
    """

    in_features: int
    out_features: int

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.bias = linear.bias

    def keep(self, **stored: Tensor) -> None:
        """Register the stored tensors, by name."""
        for name, tensor in stored.items():
            self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Product.apply(x, self)  # pyright: ignore[reportAssignmentType]
        return out if self.bias is None else out + self.bias

    def dequantized(self) -> Tensor:
        """Return the weight [O, I] in the type of the unquantized layer."""
        raise NotImplementedError


class _Product(torch.autograd.Function):
    """x W' for a frozen W that is not stored between forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantized().to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, None]:
        return grad @ ctx.layer.dequantized().to(grad.dtype), None


class Int8Linear(QuantizedLinear):
    """A linear layer in int8 with one scale for each output."""

    codes: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.keep(**int8.quantize(linear.weight.detach())._asdict())

    def dequantized(self) -> Tensor:
        return int8.dequantize(int8.Int8(self.codes, self.scales), self.dtype)


class Nf4Linear(QuantizedLinear):
    """A linear layer in NF4 with double quantization.

    Args:
        groups: of inputs that are packed apart (`nf4.quantize`).
    """

    packed: Tensor
    scale_codes: Tensor
    scale_scales: Tensor
    offset: Tensor
    level: nf4.Level = staticmethod(nf4.level_by_lookup)

    def __init__(self, linear: nn.Linear, groups: int = 1) -> None:
        super().__init__(linear)
        self.keep(**nf4.quantize(linear.weight.detach(), groups)._asdict())

    def dequantized(self) -> Tensor:
        w = nf4.Nf4(self.packed, self.scale_codes, self.scale_scales, self.offset)
        return nf4.dequantize(w, self.dtype, self.level)


def quantized(linear: nn.Linear, name: str, base_type: BaseType, groups: int = 1) -> nn.Module:
    """Return the layer with its weight stored in the base's type.

    Raises:
        ConfigError: inputs that are no multiple of NF4's block.
    """
    if base_type == "run":
        return linear
    if base_type == "int8":
        return Int8Linear(linear)
    if linear.in_features % (nf4.BLOCK * groups):
        raise ConfigError(
            f"adapter.base_dtype: given nf4, whose blocks have {nf4.BLOCK} inputs, but {name} has "
            f"{linear.in_features} inputs in {groups} shards. Expected a multiple of "
            f"{nf4.BLOCK * groups}: use base_dtype=int8, or fewer shards along this dim."
        )
    return Nf4Linear(linear, groups)
