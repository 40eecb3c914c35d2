"""The divergence from the base in a step: `regularization.kl`.

    coefficient * mean of KL(base || model) over the tokens that count

`supervised` counts supervised tokens by their loss weights, as the loss does. `all` counts every
real token once; its weights are made on the host so that the division by the step's supervised
weight leaves the mean over real tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.func import functional_call

from torchprime.adapters.apply import without_adapters
from torchprime.data.blocks.batch import Batch
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import LossSums
from torchprime.losses.divergence import BaseOutput, Divergence
from torchprime.models.decoder import CausalLM

NAME = "kl"  # of its term in a step's record
# (input ids, position ids, segment ids), each [b, S] -> the base's output, without gradient.
RunBase = Callable[[Tensor, Tensor, Tensor], BaseOutput]


@dataclass(frozen=True)
class Kl:
    """The options of the term."""

    coefficient: float
    on: Literal["supervised", "all"]


@dataclass(frozen=True)
class NearBase:
    """The divergence of one micro-batch.

    Attributes:
        base: computed without the noise and the dropout of training.
        weights: of the tokens in it, fp32 [b, S].
    """

    kl: Kl
    divergence: Divergence
    base: BaseOutput
    weights: Tensor

    def add(self, loss: LossSums, hidden: Tensor, output: Projection) -> LossSums:
        """Return the loss with the divergence, which is also its last term. Each token's share
        stays as it is, so that losses by source can be compared with held-out ones."""
        found = self.divergence(hidden, output, self.base, self.weights)
        part = self.kl.coefficient * found.loss_sum
        terms = (*loss.terms, part.detach())
        return loss._replace(loss_sum=loss.loss_sum + part, terms=terms)


def base_of(model: CausalLM, weights: Mapping[str, Tensor] | None) -> RunBase:
    """Return the forward of the base in a model's own code.

    Args:
        weights: the base's, by the model's names; None if they are the model's own, without its
            adapter.
    """

    def run(input_ids: Tensor, position_ids: Tensor, segment_ids: Tensor) -> BaseOutput:
        inputs = (input_ids, position_ids, segment_ids)
        with torch.no_grad():
            if weights is not None:
                hidden = functional_call(model, dict(weights), inputs)
                own = Projection(_output_weight(model, weights), model.output.softcap)
                return BaseOutput(hidden, own)
            with without_adapters(model.model.layers.templates()):  # type: ignore[operator]
                return BaseOutput(model(*inputs), Projection(*model.output))

    return run


def _output_weight(model: CausalLM, weights: Mapping[str, Tensor]) -> Tensor:
    head = "model.embed_tokens.weight" if model.lm_head is None else "lm_head.weight"
    return weights[head]


def weights_of_all(batch: Batch) -> Tensor:
    """Return a weight for each token [B, S]: equal for real tokens, 0 for padding. Their sum is the
    batch's supervised weight, by which the step divides."""
    real = torch.from_numpy(batch.segment_ids > 0)
    supervised = batch.loss_weights[batch.targets >= 0].sum(dtype="float64")
    return real.float() * (float(supervised) / max(1, int(real.sum())))
