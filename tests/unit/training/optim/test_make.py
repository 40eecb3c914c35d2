"""Optimizers by name, and what holds for each of them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from updates import ours

from torchprime.config.compose import compose_config
from torchprime.config.sections.optimizer import OptimizerName
from torchprime.training.optim.adafactor import Adafactor
from torchprime.training.optim.adamw import AdamW
from torchprime.training.optim.lion import Lion
from torchprime.training.optim.make import make_optimizer
from torchprime.training.setup.recipe import optimizer_of

NAMES = get_args(OptimizerName)


def chosen(*overrides: str):
    run = ["model.pretrained_model=x", "task.max_steps=1"]
    return optimizer_of(compose_config([*run, *overrides]))


@pytest.mark.parametrize(("name", "eps"), [("adamw", 1e-8), ("adafactor", 1e-30)])
def test_each_method_has_its_own_epsilon_from_the_config(name: str, eps: float) -> None:
    """Adafactor adds it to squared gradients: AdamW's 1e-8 there would swallow small ones."""
    made = chosen(f"task.optimizer.name={name}")
    assert isinstance(made, AdamW | Adafactor) and made.eps == eps


def test_each_method_has_its_own_betas_from_the_config() -> None:
    for name, betas in (("adamw", (0.9, 0.999)), ("lion", (0.9, 0.99))):
        made = chosen(f"task.optimizer.name={name}")
        assert isinstance(made, AdamW | Lion) and made.betas == betas
        made = chosen(f"task.optimizer.name={name}", "task.optimizer.betas=[0.8,0.9]")
        assert isinstance(made, AdamW | Lion) and made.betas == (0.8, 0.9)


@pytest.mark.parametrize("name", NAMES)
def test_a_stack_of_layers_is_updated_like_each_layer(name: str) -> None:
    """Scan keeps all layers in one tensor; no statistic may mix them."""
    optimizer = make_optimizer(name, weight_decay=0.1)
    g = torch.Generator().manual_seed(1)
    key = "model.layers.0.mlp.up_proj.weight"
    for shape in ((6, 5), (7,), (64, 64)):
        layers = [{key: torch.randn(shape, generator=g)} for _ in range(3)]
        grads = [[{key: torch.randn(shape, generator=g)} for _ in range(4)] for _ in layers]
        apart = [ours(optimizer, w, gs, 0.1)[key] for w, gs in zip(layers, grads, strict=True)]
        together = ours(
            optimizer,
            {key: torch.stack([w[key] for w in layers])},
            [{key: torch.stack([gs[t][key] for gs in grads])} for t in range(4)],
            0.1,
            stacked=True,
        )[key]
        torch.testing.assert_close(together, torch.stack(apart))
