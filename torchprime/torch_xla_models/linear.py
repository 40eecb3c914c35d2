"""Linear layers that XLA compiles well.

torch_xla lowers nn.Linear on [B, S, D] through a view to [B*S, D], which loses the sharding of the
sequence; an einsum keeps the dims apart. Its weight gradient is the exception: contracted
over two dims at once, XLA on the CPU first transposes both operands in memory. Flattened, it
transposes only the left one, so the narrower operand is put there; the product has no sequence dim
left to lose.

On few rows XLA on the CPU is several times faster with the weight as [in, out]; generation passes
such a copy.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        out = torch.einsum("bsn,mn->bsm", x, weight)
        return out if bias is None else out + bias

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        grad_x = torch.einsum("bsm,mn->bsn", grad, weight)
        x, flat = x.flatten(0, 1), grad.flatten(0, 1)
        if flat.shape[1] > x.shape[1]:
            grad_w = torch.matmul(x.t(), flat).t()
        else:
            grad_w = torch.matmul(flat.t(), x)
        return grad_x, grad_w, grad.sum((0, 1)) if ctx.has_bias else None


class XlaLinear(nn.Linear):
    """nn.Linear for [B, S, D] inputs with the products above."""

    transposed: Tensor | None  # during generation: the weight as [in, out]

    def forward(self, input: Tensor) -> Tensor:
        if self.transposed is not None:
            out = torch.einsum("bsn,nm->bsm", input, self.transposed)
            return out if self.bias is None else out + self.bias
        return _Linear.apply(input, self.weight, self.bias)  # type: ignore[no-any-return]


def replace_linears(module: nn.Module) -> None:
    """Replace every nn.Linear below by an XlaLinear; parameters, names and hooks stay."""
    for child in module.modules():
        if type(child) is nn.Linear:
            child.__class__ = XlaLinear
            child.register_buffer("transposed", None, persistent=False)
