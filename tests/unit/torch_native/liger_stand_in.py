"""Liger's fused cross-entropy by its names and shapes, written out in plain torch for the CPU.

What it returns is what version 0.8.5 does: (loss per token, three optional extras, gradients to
input, weight and bias), gradients of the sum in which each token counts `token_grad_output` times.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    ce_weight: Tensor | None = None,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    accum_dtype: torch.dtype | None = None,
    token_grad_output: Tensor | None = None,
    compute_gradients: bool | None = None,
    weight_requires_grad: bool | None = None,
) -> tuple[Tensor | None, ...]:
    """_input [tokens, D], weight [V, D], target int64 [tokens]."""
    assert ce_weight is None and bias is None and reduction == "none"
    assert target.dtype == torch.int64 and target.shape == _input.shape[:1]
    logits = (_input @ weight.t()).float()
    loss = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none")
    if not compute_gradients:
        return loss, None, None, None, torch.zeros_like(_input), None, None
    assert weight_requires_grad and token_grad_output is not None
    known = target != ignore_index
    onehot = F.one_hot(torch.where(known, target, 0), weight.shape[0])
    gradient = torch.where(known[:, None], logits.softmax(-1) - onehot, 0.0)
    gradient = gradient.to(_input.dtype) * token_grad_output[:, None].to(_input.dtype)
    grad_weight = (gradient.t() @ _input).to(accum_dtype)
    return loss, None, None, None, gradient @ weight, grad_weight, None
