"""Our optimizers with the reference's settings, for models of a few thousand weights."""

from __future__ import annotations

import reference
import torch

from torchprime.training.optim import adamw_8bit
from torchprime.training.optim.groups import Group
from torchprime.training.optim.make import make_optimizer
from torchprime.training.optim.optimizer import Optimizer

NAMES = ("adamw", "muon", "lion", "sgd", "adamw_8bit")
EMA_DECAY = 0.6
# Those of `reference.in_groups`.
GROUPS = (
    Group("model.embed_tokens", frozen=True),
    Group("model.layers.*.mlp.down_proj", frozen=True),
    Group("model.layers.0", lr_factor=0.5),
    Group("model.layers.1.self_attn", weight_decay=0.4),
)


def small_optimizer(name: str) -> Optimizer:
    """The optimizer of this name. Matrices of any size have 8-bit state, a block for each row."""
    adamw_8bit.SMALLEST = adamw_8bit.SMALLEST_BLOCK = 1
    eps = reference.FACTOR_EPS if name == "adafactor" else reference.EPS
    nesterov = True if name in ("muon", "sgd") else None
    return make_optimizer(name, eps=eps, weight_decay=reference.DECAY, nesterov=nesterov)


def gradient(name: str, shape: torch.Size, step: int) -> torch.Tensor:
    """A gradient of a parameter that is the same in every process."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1000 * step)
    return torch.randn(shape, generator=generator)
