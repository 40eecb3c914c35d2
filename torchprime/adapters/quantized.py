"""Frozen linear layers whose weight is stored in int8 or NF4.

The weight is dequantized for each use, in the forward and again in the backward, so no more than
one layer's is in memory in full precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from torchprime.adapters import int8, nf4
from torchprime.adapters.spec import BaseType
from torchprime.errors import ConfigError

OUTPUT = "lm_head"
# A type of one byte under which codes may be stored, where parameters can't be integers (FSDP2).
AS_FLOAT = torch.float8_e4m3fn


class QuantizedLinear(nn.Module):
    """A frozen linear layer; subclasses store its weight.

    The stored tensors are parameters without gradient, so that they are sharded, stacked and placed
    like other weights.
    """

    in_features: int
    out_features: int
    parts: ClassVar[tuple[str, ...]]  # the names of the stored tensors
    integers: ClassVar[torch.dtype]  # of those that hold codes

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
        out: Tensor = _Product.apply(x, self, *self.stored())  # pyright: ignore[reportAssignmentType]
        return out if self.bias is None else out + self.bias

    def stored(self) -> list[Tensor]:
        """Return the stored tensors, in the order of `parts`."""
        found = [getattr(self, name) for name in self.parts]
        return [t.view(self.integers) if t.dtype == AS_FLOAT else t for t in found]

    def dequantized(self) -> Tensor:
        """Return the weight [O, I] in the type of the unquantized layer."""
        return self.weight_from(*self.stored())

    def weight_from(self, *stored: Tensor) -> Tensor:
        """Return the weight [O, I] of stored tensors."""
        raise NotImplementedError


class _Product(torch.autograd.Function):
    """x W' for a frozen W that is not stored between forward and backward.

    The stored tensors are arguments: `functional_call` has put back the layer's own at the time of
    the backward.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear, *stored: Tensor) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(*stored)
        return F.linear(x, layer.weight_from(*stored).to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        stored = ctx.saved_tensors
        weight = ctx.layer.weight_from(*stored)
        return grad @ weight.to(grad.dtype), None, *(None for _ in stored)


class Int8Linear(QuantizedLinear):
    """A linear layer in int8 with one scale for each output."""

    codes: Tensor
    scales: Tensor
    parts = int8.Int8._fields
    integers = torch.int8

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.keep(**int8.quantize(linear.weight.detach())._asdict())

    def weight_from(self, *stored: Tensor) -> Tensor:
        return int8.dequantize(int8.Int8(*stored), self.dtype)


class Nf4Linear(QuantizedLinear):
    """A linear layer in NF4 with double quantization.

    Args:
        groups: of inputs that are packed apart (`nf4.quantize`).
    """

    packed: Tensor
    scale_codes: Tensor
    scale_scales: Tensor
    offset: Tensor
    parts = nf4.Nf4._fields
    integers = torch.uint8
    level: nf4.Level = staticmethod(nf4.level_by_lookup)

    def __init__(self, linear: nn.Linear, groups: int = 1) -> None:
        super().__init__(linear)
        self.keep(**nf4.quantize(linear.weight.detach(), groups)._asdict())

    def weight_from(self, *stored: Tensor) -> Tensor:
        return nf4.dequantize(nf4.Nf4(*stored), self.dtype, self.level)


# Last parts of the names of parameters that keep their type in every run: parts of quantized
# weights, and the layer's number for dropout.
STORED = frozenset({*Int8Linear.parts, *Nf4Linear.parts, "number"})


def placed_type(name: str, parameter: Tensor, dtype: torch.dtype) -> torch.dtype:
    """Return the type of a parameter in a run whose weights have type dtype."""
    keeps = name.rpartition(".")[2] in STORED or not parameter.dtype.is_floating_point
    return parameter.dtype if keeps else dtype


def quantized(linear: nn.Linear, name: str, base_type: BaseType, groups: int = 1) -> nn.Module:
    """Return the layer with its weight stored in the base's type.

    Raises:
        ConfigError: a size or inputs that NF4 can't store.
    """
    if base_type == "run":
        return linear
    if base_type == "int8":
        return Int8Linear(linear)
    size, pairs = linear.in_features * linear.out_features, 2 * groups
    if size % nf4.BLOCK or linear.in_features % pairs:
        raise ConfigError(
            f"adapter.base_dtype: given nf4, which stores blocks of {nf4.BLOCK} weights and pairs "
            f"of inputs, but {name} has the shape [{linear.out_features}, {linear.in_features}], "
            f"in {groups} shards along its inputs. Expected a multiple of {nf4.BLOCK} weights and "
            f"of {pairs} inputs: use base_dtype=int8, or fewer shards along this dim."
        )
    return Nf4Linear(linear, groups)


def quantize_base(model: nn.Module, base_type: BaseType, groups_of: Callable[[str], int]) -> None:
    """Store the frozen linear layers in the base's type, in place; call after `apply_adapter`.

    Adapters, modules that are trained whole and the output projection stay. A model on meta gets
    shapes and types, and computes nothing.

    Args:
        groups_of: the number of shards along the inputs of a layer, by its name without adapters,
            such as `model.layers.0.mlp.down_proj`.

    Raises:
        ConfigError: see `quantized`.
    """
    frozen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not module.weight.requires_grad and name != OUTPUT
    }
    for name, linear in frozen.items():
        parent, _, last = name.rpartition(".")
        plain = name.removesuffix(".base_layer")
        layer = quantized(linear, plain, base_type, groups_of(plain))
        setattr(model.get_submodule(parent), last, layer)
