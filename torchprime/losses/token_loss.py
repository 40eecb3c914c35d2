"""The loss of a supervised token: its cross-entropy, or one of its variants.

    cross-entropy    -log p
    label smoothing  (1 - e) * -log p + e * mean over the vocabulary of -log p   arXiv:1512.00567
    z-loss           + z * (log Z)^2, Z the sum of exp(logits)                   arXiv:2204.02311
    DFT              sg(p) * -log p, where sg(p) carries no gradient             arXiv:2508.05629

p is the probability of the target. The z-loss is added to each of the others, and no other factor
changes it. A token's weight multiplies the whole.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class TokenLoss(NamedTuple):
    """The variant, with its parameters; the default is the cross-entropy alone."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False

    @property
    def terms(self) -> tuple[str, ...]:
        """The names of the sums that a variant reports beside its loss."""
        if self == CROSS_ENTROPY:
            return ()
        return ("cross_entropy", "z_loss") if self.z_loss else ("cross_entropy",)


CROSS_ENTROPY = TokenLoss()


class Cost(NamedTuple):
    """The loss of tokens [B, C], and the factors of its gradient by their logits."""

    loss: Tensor
    z_loss: Tensor  # the part of it
    of_softmax: Tensor
    of_target: Tensor
    of_all: float

    def gradient(self, softmax: Tensor, onehot: Tensor) -> Tensor:
        """Return the gradient by the logits [B, C, V]."""
        target = onehot * self.of_target[..., None]
        return softmax * self.of_softmax[..., None] - target - self.of_all


def cost_of(
    kind: TokenLoss, nll: Tensor, log_z: Tensor, mean_logit: Tensor | None, vocab: int
) -> Cost:
    """Return the loss of tokens, and its gradient.

    Args:
        nll: -log p of the targets, fp32 [B, C]; 0 for an ignored token, like log_z.
        log_z: the log of the sum of exp(logits).
        mean_logit: over the vocabulary; needed for label smoothing only.
        vocab: the size of the vocabulary.
    """
    smoothing = kind.label_smoothing
    factor = (-nll).exp() if kind.dft else torch.ones_like(nll)
    of_target = (1 - smoothing) * factor
    loss = of_target * nll
    if mean_logit is not None:
        loss = loss + smoothing * (log_z - mean_logit)
    z_loss = kind.z_loss * log_z.square()
    of_softmax = factor + 2 * kind.z_loss * log_z
    return Cost(loss + z_loss, z_loss, of_softmax, of_target, smoothing / vocab)
