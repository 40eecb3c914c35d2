"""The root of the modules that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.models.decoder import CausalLM
from torchprime.torch_native.fused_loss import on_supervised_tokens
from torchprime.training.step import CrossEntropy, loss_of


class Root(nn.Module):
    """The module that a step calls: model and loss together, so that FSDP2 has the output
    projection gathered while the loss multiplies by it.

    Attributes:
        cross_entropy: the loss of held-out rows.
        training_loss: the loss that a step minimizes.
    """

    def __init__(self, model: CausalLM) -> None:
        super().__init__()
        self.model = model
        self.cross_entropy: CrossEntropy = chunked_cross_entropy
        self.training_loss: CrossEntropy = chunked_cross_entropy

    def forward(
        self,
        *fields: Tensor,
        training: bool = False,
        instead: Callable[[], Any] | None = None,
    ) -> Any:
        """Return the loss, or the result of `instead` with the root's weights gathered
        (generation)."""
        if instead is not None:
            return instead()
        loss = self.training_loss if training else self.cross_entropy
        return loss_of(self.model, fields, partial(on_supervised_tokens, loss))
