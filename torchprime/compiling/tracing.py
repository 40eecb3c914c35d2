"""One step of a run through a backend whose tensors have no storage, so that it records a program.

The parts of the step are those that training takes from the config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torchprime.adapters.apply import is_adapted
from torchprime.config.schema import TrainConfig
from torchprime.data.blocks.batch import empty_batch
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable
from torchprime.training.backend import Backend, StepOptions
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.regularization.penalty import AnchorSource
from torchprime.training.setup.recipe import (
    model_of,
    optimizer_of,
    sharding_table,
    step_options,
)


class StepParts(NamedTuple):
    """The parts of a step.

    Attributes:
        model: without storage.
        dtype: of its weights.
        shape: [blocks, sequence] of an update's batch, over all devices and micro-batches.
    """

    model: CausalLM
    table: ShardingTable
    dtype: torch.dtype
    optimizer: Optimizer
    options: StepOptions
    shape: tuple[int, int]


def step_parts(config: TrainConfig, architecture: Mapping[str, Any]) -> StepParts:
    """Return the parts of a config's step for a model's config.json.

    Raises:
        ConfigError: an adapter that does not fit the model.
    """
    dtype = getattr(torch, config.torch_dtype)
    model = model_of(config, architecture_from_hf(architecture, where="model"), dtype)
    return StepParts(
        model,
        sharding_table(config, model),
        dtype,
        optimizer_of(config),
        step_options(config, max(1, len(config.dataset.mixture))),
        (config.task.global_batch_size, config.dataset.block_size),
    )


def run_step(backend: Backend, parts: StepParts) -> None:
    """Place the model on a backend that holds no data, and run one step of an empty batch."""
    model, table, dtype, optimizer, options, shape = parts
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def empty(name: str) -> Tensor:
        return torch.empty(shapes[name], device="meta")

    runs_base = options.kl is not None and not is_adapted(model)
    backend.place(model, table, empty, dtype, empty if runs_base else None)
    anchors = options.penalty and AnchorSource(empty, empty if options.penalty.has_fisher else None)
    backend.prepare_training(optimizer, options, anchors=anchors)
    batch = empty_batch(shape, with_sources=options.num_sources > 1)
    backend.train_step(backend.put(batch, options.gradient_accumulation_steps), lr=0.0)
