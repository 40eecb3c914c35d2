"""The root of the modules that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import LossSums, chunked_cross_entropy
from torchprime.losses.divergence import BaseOutput, Divergence
from torchprime.models.decoder import CausalLM
from torchprime.torch_native.fused_loss import on_supervised_tokens, on_tokens
from torchprime.training.regularization.near_base import NearBase
from torchprime.training.step import CrossEntropy, loss_of


class Root(nn.Module):
    """The module that a step calls: model and loss together, so that FSDP2 has the output
    projection gathered while the loss multiplies by it.

    Attributes:
        base: a frozen copy of the base, for a divergence from it; None if there is none.
        cross_entropy: the loss of held-out rows.
        training_loss: the loss that a step minimizes.
    """

    def __init__(self, model: CausalLM, base: CausalLM | None = None) -> None:
        super().__init__()
        self.model, self.base = model, base
        self.cross_entropy: CrossEntropy = chunked_cross_entropy
        self.training_loss: CrossEntropy = chunked_cross_entropy

    def forward(
        self,
        *fields: Tensor,
        training: bool = False,
        near: NearBase | None = None,
        instead: Callable[[], Any] | None = None,
    ) -> Any:
        """Return the loss, or the result of `instead` with the root's weights gathered (generation,
        the base of a divergence)."""
        if instead is not None:
            return instead()
        if near is not None:
            # Its output weight is gathered for this call like the model's.
            output = Projection(*(self.base or self.model).output)
            near = replace(near, base=BaseOutput(near.base.hidden, output))
        loss = self.training_loss if training else self.cross_entropy
        return loss_of(self.model, fields, partial(on_supervised_tokens, loss), near)


def on_counted_tokens(
    divergence: Divergence, hidden: Tensor, output: Projection, base: BaseOutput, weights: Tensor
) -> LossSums:
    """Return the same divergence with logits of the tokens that count only."""

    def compute(some_hidden: Tensor, some_base: Tensor, some_weights: Tensor) -> LossSums:
        other = BaseOutput(some_base, base.output)
        return divergence(some_hidden, output, other, some_weights)

    return on_tokens(weights, (hidden, base.hidden, weights), compute)
