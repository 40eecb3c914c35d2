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
    lse_square_scale: float = 0.0,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
    return_z_loss: bool = False,
    accum_dtype: torch.dtype | None = None,
    token_grad_output: Tensor | None = None,
    compute_gradients: bool | None = None,
    weight_requires_grad: bool | None = None,
    softcap: float | None = None,
) -> tuple[Tensor | None, ...]:
    """_input [tokens, D], weight [V, D], target int64 [tokens]."""
    assert ce_weight is None and bias is None and reduction == "none"
    assert target.dtype == torch.int64 and target.shape == _input.shape[:1]
    logits = (_input @ weight.t()).float()
    logits.requires_grad_()
    with torch.enable_grad():
        capped = logits if softcap is None else softcap * (logits / softcap).tanh()
        loss = F.cross_entropy(
            capped,
            target,
            ignore_index=ignore_index,
            reduction="none",
            label_smoothing=label_smoothing,
        )
        squares = lse_square_scale * capped.logsumexp(-1).square()
        squares = torch.where(target != ignore_index, squares, 0.0)
        loss = loss + squares
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
    loss = loss.detach()
    z_loss = squares.detach().to(_input.dtype) if return_z_loss else None
    if not compute_gradients:
        return loss, z_loss, None, None, torch.zeros_like(_input), None, None
    assert weight_requires_grad and token_grad_output is not None
    gradient = gradient.to(_input.dtype) * token_grad_output[:, None].to(_input.dtype)
    grad_weight = (gradient.t() @ _input).to(accum_dtype)
    return loss, z_loss, None, None, gradient @ weight, grad_weight, None
