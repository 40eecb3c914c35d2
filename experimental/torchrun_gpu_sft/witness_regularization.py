"""The witness' regularization: L2-SP, EWC and the divergence from the base, over full logits.

A copy of transformers' own model is the base. The terms are written here once more, by autograd and
torch's kl_div; of ours only the Fisher information is read.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchprime.checkpoint.fisher import FisherFolder
from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig


def check_regularization(c: TrainConfig, processes: int) -> None:
    """Refuse what the witness does not compute.

    Raises:
        ConfigError: several processes, an adapter, bf16, or a mean over all tokens.
    """
    r = c.regularization
    if not r.enabled:
        return
    if r.penalty is not None and c.torch_dtype != "float32":
        refuse(
            "torch_dtype",
            c.torch_dtype,
            "float32: the distance from the base is that of fp32 weights",
            "Set torch_dtype=float32 in both runs.",
        )
    if processes > 1 or c.adapter.enabled:
        refuse(
            "regularization",
            "a term of the loss",
            "none for a witness with several processes or an adapter",
            "Start one process without an adapter.",
        )
    if r.kl.coefficient is not None and r.kl.on == "all":
        refuse(
            "regularization.kl.on",
            "all",
            "supervised: Trainer gives the update's supervised weight only",
            "Set regularization.kl.on=supervised in both runs.",
        )


class Regularization:
    """The terms of one run.

    Args:
        model: transformers', with the base's weights.
    """

    def __init__(self, c: TrainConfig, model: Any) -> None:
        self.config, self.micro_batches = c.regularization, c.task.gradient_accumulation_steps
        self.base = copy.deepcopy(model).eval().requires_grad_(False)
        folder = self.config.ewc.fisher
        self.fisher = None if folder is None else FisherFolder(Path(folder))

    def part(self, model: Any, logits: Tensor, inputs: Mapping[str, Any], weight: Tensor) -> Tensor:
        """Return one micro-batch's part of the terms.

        Args:
            logits: of the model on these inputs.
            weight: of the whole update, over all micro-batches.
        """
        total = logits.new_zeros((), dtype=torch.float32)
        if self.config.penalty is not None:
            total = total + self.config.penalty[1] * self._squares(model) / self.micro_batches
        if self.config.kl.coefficient is not None:
            given = {name: value for name, value in inputs.items() if name != "labels"}
            with torch.no_grad():
                of_base = self.base(**given).logits
            log_p, log_q = (each.float().log_softmax(-1) for each in (logits, of_base))
            each = F.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
            labels = inputs["labels"]
            counted = torch.where(labels["targets"] >= 0, labels["weights"], 0.0)
            total = total + self.config.kl.coefficient * (each * counted).sum() / weight
        return total

    def _squares(self, model: Any) -> Tensor:
        """Return the sum of F (w - w0)^2."""
        base, sums = dict(self.base.named_parameters()), []
        for name, parameter in model.named_parameters():
            squares = (parameter.float() - base[name].float()).square()
            if self.fisher is not None:
                squares = squares * self.fisher.get(name)
            sums.append(squares.sum())
        return torch.stack(sums).sum()
