"""Linear layers that XLA compiles well.

torch_xla lowers nn.Linear on [B, S, D] through a view to [B*S, D], which loses the sharding of the
sequence; an einsum keeps the dims apart. Its weight gradient is the exception: contracted
over two dims at once, XLA on the CPU first transposes both operands in memory. Flattened, it
transposes only the left one, so the narrower operand is put there; the product has no sequence dim
left to lose.

XLA on the CPU transposes a weight in memory for each product of few rows. So generation passes a
copy of a small weight as [in, out], and multiplies a large one from the left
(`few_rows_product`).

A quantized weight is gathered as it is stored, and each device dequantizes what it multiplies by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch_xla.core.xla_model as xm
import torch_xla.runtime as xr
from torch import Tensor, nn

from torchprime.adapters import nf4
from torchprime.adapters.quantized import Int8Linear, Nf4Linear, QuantizedLinear
from torchprime.sharding import Spec
from torchprime.torch_xla_models.layers.runner import behind_barrier

# Shape suffixes of the products: b batch, s sequence, n inputs, m outputs.


# (inputs [T, N], gradient by the outputs [T, M]) -> the gradient by the weight [M, N].
WeightGradient = Callable[[Tensor, Tensor], Tensor]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx, x: Tensor, weight: Tensor, bias: Tensor | None, gradient: WeightGradient
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.has_bias, ctx.gradient = bias is not None, gradient
        out = torch.einsum("bsn,mn->bsm", x, weight)
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias, _ = ctx.needs_input_grad
        return (
            torch.einsum("bsm,mn->bsn", grad, weight) if of_x else None,
            ctx.gradient(x.flatten(0, 1), grad.flatten(0, 1)) if of_weight else None,
            grad.sum((0, 1)) if ctx.has_bias and of_bias else None,
            None,
        )


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient by a weight as one product."""
    if grad.shape[1] > x.shape[1]:
        return torch.matmul(x.t(), grad).t()
    return torch.matmul(grad.t(), x)


# Numbers of a matrix up to which few rows are multiplied faster by an [in, out] copy of it.
# Above, its rows are too far apart for the caches, above all if they are a power of two apart.
LARGEST_TURNED = 2**20


def few_rows_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x weight^T for few rows [B, I] and a large weight [O, I], fast for XLA on the CPU.

    It is (weight x^T)^T. Without the barrier XLA would make it x weight^T again, and transpose the
    weight in memory.
    """
    out = torch.matmul(weight, x.t())
    xm.optimization_barrier_([out])
    return out.t()


class XlaLinear(nn.Linear):
    """nn.Linear for [B, S, D] inputs with the products above.

    Attributes:
        transposed: the weight as [in, out], during generation with a small weight on the CPU.
        large: the weight is larger, during generation on the CPU.
        gradient: computes the weight's gradient.
    """

    transposed: Tensor | None
    gradient: WeightGradient
    large = False

    def forward(self, input: Tensor) -> Tensor:
        if self.transposed is not None:
            out = torch.einsum("bsn,nm->bsm", input, self.transposed)
        elif self.large and input.shape[1] == 1:
            out = few_rows_product(input[:, 0], self.weight)[:, None]
        else:
            return _Linear.apply(input, self.weight, self.bias, self.gradient)  # type: ignore[no-any-return]
        return out if self.bias is None else out + self.bias


# (name of a quantized layer's part, its tensor) -> the tensor as each device dequantizes it.
Gather = Callable[[str, Tensor], Tensor]


class _Dequantized(torch.autograd.Function):
    """The product with a frozen weight that is dequantized in the forward and again in the
    backward."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: XlaQuantized, *stored: Tensor) -> Tensor:  # type: ignore[override]
        ctx.layer = layer
        ctx.save_for_backward(*stored)
        x, weight = layer.weight_for(x, stored)
        return torch.einsum("bsn,mn->bsm", x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        stored = ctx.saved_tensors
        grad, weight = ctx.layer.weight_for(grad, stored)
        return torch.einsum("bsm,mn->bsn", grad, weight), None, *(None for _ in stored)


class XlaQuantized(QuantizedLinear):
    """The part of quantized layers that XLA has in another form, for [B, S, D] inputs.

    Attributes:
        gather: annotates a stored tensor with the sharding that the product needs.
        apart: each product has a dequantized weight of its own. Left to itself, the compiler would
            recognize that the backward dequantizes what the forward has, and would keep the weights
            of all layers in memory. In a loop over layers it can't, and there it may share the
            weight between the recomputed forward of a layer and its backward.
    """

    gather: Gather
    apart: bool

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = _Dequantized.apply(x, self, *self.stored())  # type: ignore
        return out if self.bias is None else out + self.bias

    def weight_for(self, factor: Tensor, stored: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the other factor of a product, unchanged, and the weight in its type."""
        if self.apart:
            factor, *stored = behind_barrier([factor, *stored])
        return factor, self.weight_from(*stored).to(factor.dtype)

    def weight_from(self, *stored: Tensor) -> Tensor:
        pairs = zip(self.parts, stored, strict=True)
        return self.weight_from_gathered(*(self.gather(name, tensor) for name, tensor in pairs))

    def weight_from_gathered(self, *gathered: Tensor) -> Tensor:
        """Return the weight [O, I] of gathered tensors, whose dims are in this backend's order."""
        pairs = zip(self.parts, gathered, strict=True)
        return super().weight_from(*(_turn_back(name, tensor) for name, tensor in pairs))


class XlaInt8Linear(XlaQuantized, Int8Linear):
    """Int8Linear with the products above."""


class XlaNf4Linear(XlaQuantized, Nf4Linear):
    """Nf4Linear with the products above.

    Attributes:
        in_blocks: a weight is dequantized as [groups, blocks, inputs of a block, outputs], without
            the first dim if there is one group. No step from the codes to the rounded value changes
            the shape, so a TPU does all of them in one fusion. Else it writes the scale of every
            weight to memory in fp32. (XLA on the CPU would copy the codes of all layers.)
    """

    in_blocks = False

    def weight_from_gathered(self, *gathered: Tensor) -> Tensor:
        w = nf4.Nf4(*gathered)
        groups, half, outputs = w.packed.shape
        # A block that lies partly in the high and partly in the low bits has no such shape.
        if not self.in_blocks or half % nf4.BLOCK:
            return super().weight_from_gathered(*gathered)
        leading = (-1,) if groups == 1 else (groups, -1)
        packed = w.packed.view(*leading, nf4.BLOCK, outputs)
        codes = torch.cat([packed >> 4, packed & 15], dim=-3)
        scales_OG = nf4.scales(w._replace(scale_codes=w.scale_codes.t()))
        scales = scales_OG.t().reshape(*leading, 1, outputs)
        return (self.level(codes) * scales).to(self.dtype).view(-1, outputs).t()


# Here the outputs are the last dim of these parts: a TPU dequantizes them in that layout, and would
# copy the stacks of all layers into it before the loop over layers.
_TURNED = {"packed": (1, 2, 0), "scale_codes": (1, 0)}


def _turned_dims(name: str, count: int) -> tuple[int, ...]:
    return _TURNED.get(name.rpartition(".")[2], tuple(range(count)))


def turned(name: str, tensor: Tensor) -> Tensor:
    """Return a parameter's tensor with its dims in the order of this backend."""
    dims = _turned_dims(name, tensor.dim())
    return tensor if dims == tuple(range(tensor.dim())) else tensor.permute(dims).contiguous()


def turned_spec(name: str, spec: Spec) -> Spec:
    """Return the spec of a parameter's dims in the order of this backend."""
    return tuple(spec[dim] for dim in _turned_dims(name, len(spec)))


def original_shape(name: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape outside this backend of a parameter that has a shape in it."""
    dims = _turned_dims(name, len(shape))
    return tuple(shape[dims.index(dim)] for dim in range(len(shape)))


def _turn_back(name: str, tensor: Tensor) -> Tensor:
    dims = _turned_dims(name, tensor.dim())
    return tensor.permute([dims.index(dim) for dim in range(len(dims))])


def replace_linears(
    module: nn.Module,
    gather: Callable[[str, str, Tensor], Tensor],
    *,
    apart: bool,
    gradient_of: Callable[[str, nn.Linear], WeightGradient] = lambda *_: weight_gradient,
) -> None:
    """Replace every linear layer below by its form for XLA; parameters, names and hooks stay.

    Args:
        gather: annotates a part of a quantized weight, given the names of the layer below `module`
            and of the part, with the sharding that its product needs.
        apart: `XlaQuantized.apart`.
        gradient_of: returns the computation of a weight's gradient, by the name of the layer below
            `module`.
    """
    for name, found in module.named_modules():
        child = cast(Any, found)  # whose class changes
        if type(found) is nn.Linear:
            child.__class__ = XlaLinear
            child.gradient = gradient_of(name, found)
            child.register_buffer("transposed", None, persistent=False)
        elif isinstance(found, QuantizedLinear):
            child.__class__ = XlaInt8Linear if isinstance(found, Int8Linear) else XlaNf4Linear
            child.gather, child.apart = partial(gather, name), apart
            child.keep(**{part: turned(part, getattr(child, part)) for part in child.parts})
            if xr.device_type() == "TPU":
                child.level, child.in_blocks = nf4.level_by_selects, True
