"""Low-rank adapters around linear layers: LoRA and DoRA.

LoRA (Hu et al., arXiv:2106.09685) adds scale * B A x to a frozen layer's output. DoRA (Liu et al.,
arXiv:2402.09353) also trains the norm of each output's weights. The numbers equal PEFT's.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchprime.adapters.dropout import CounterDropout
from torchprime.adapters.spec import AdapterSpec

A, B = ".lora_A.weight", ".lora_B.weight"  # ends of the names of these matrices
# Shape suffixes: B batch, S sequence, I inputs of the layer, O outputs, R rank.


class Linear(Protocol):
    """A frozen linear layer, stored in any form."""

    in_features: int
    out_features: int
    bias: Tensor | None

    def dequantized(self) -> Tensor:
        """Return the weight [O, I] in the type of the layer's outputs."""
        ...


def weight_of(base: nn.Module) -> Tensor:
    """Return the weight [O, I] of a base layer, dequantized if it is quantized."""
    if isinstance(base, nn.Linear):
        return base.weight
    return cast(Linear, base).dequantized()


class AdaptedLinear(nn.Module):
    """A frozen linear layer with a trained addition of low rank.

    Parameters have the names of PEFT's files: `lora_A.weight` [R, I], `lora_B.weight` [O, R] and,
    for DoRA, `lora_magnitude_vector` [O]. The frozen layer's are below `base_layer`.

    Args:
        base: the frozen layer.
        spec: the adapter's description.
        number: of the layer in the model, for dropout.

    Attributes:
        off: true leaves the frozen layer alone (`without_adapters`).
    """

    def __init__(self, base: nn.Module, spec: AdapterSpec, number: int) -> None:
        super().__init__()
        linear = cast(Linear, base)
        options: dict[str, Any] = {"device": next(base.parameters()).device}
        self.base_layer = base.requires_grad_(False)
        self.scale = spec.scale
        self.lora_dropout = CounterDropout(spec.dropout, number)
        self.lora_A = nn.Linear(linear.in_features, spec.rank, bias=False, **options)
        self.lora_B = nn.Linear(spec.rank, linear.out_features, bias=False, **options)
        if spec.dora:
            self.lora_magnitude_vector = nn.Parameter(torch.empty(linear.out_features, **options))
        self.dora = spec.dora
        self.off = False

    def forward(self, x_BSI: Tensor) -> Tensor:
        out = self.base_layer(x_BSI)
        if self.off:
            return out
        dropped = self.lora_dropout(x_BSI)
        low_rank = self.lora_B(self.lora_A(dropped) * self.scale)
        if not self.dora:
            return out + low_rank
        return out + self._dora(x_BSI, dropped, out, low_rank)

    def _dora(self, x: Tensor, dropped: Tensor, out: Tensor, low_rank: Tensor) -> Tensor:
        """Return what DoRA adds to the base layer's output."""
        bias = cast(Linear, self.base_layer).bias
        weight = weight_of(self.base_layer)
        without_bias = out if bias is None else out - bias
        plain = without_bias if dropped is x else F.linear(dropped, weight)
        delta = self.scale * (self.lora_B.weight @ self.lora_A.weight)
        # The paper (4.3) takes the norm as a constant in the backward.
        factor = self.lora_magnitude_vector / row_norms(weight + delta.to(weight.dtype)).detach()
        return (factor - 1) * plain + factor * low_rank


def row_norms(weight_OI: Tensor) -> Tensor:
    """Return the norm [O] of each output's weights."""
    return torch.linalg.vector_norm(weight_OI, dim=1)


def initial_values(
    spec: AdapterSpec, weight_OI: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Return fp32 values for a new adapter by parameter name: the model stays as its base.

    A is `kaiming` (uniform with bound 1 / sqrt(inputs), PEFT's default and nn.Linear's) or
    `gaussian` (standard deviation 1 / rank); B is 0; the magnitude is the norm of each row.
    """
    outputs, inputs = weight_OI.shape
    a = torch.empty(spec.rank, inputs)
    if spec.init == "kaiming":
        bound = inputs**-0.5
        a.uniform_(-bound, bound, generator=generator)
    else:
        a.normal_(0.0, 1 / spec.rank, generator=generator)
    values = {"lora_A.weight": a, "lora_B.weight": torch.zeros(outputs, spec.rank)}
    if spec.dora:
        values["lora_magnitude_vector"] = row_norms(weight_OI.float())
    return values


def merged_weight(
    weight_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor | None = None
) -> Tensor:
    """Return the weight [O, I] that alone computes what base and adapter compute together.

    It is computed in fp32 and rounded once, to the type of the weight.
    """
    wide = weight_OI.float()
    merged = wide + scale * (b_OR.float() @ a_RI.float())
    if magnitude_O is not None:
        merged = merged * (magnitude_O.float() / row_norms(merged))[:, None]
    return merged.to(weight_OI.dtype)
