"""A config's model on a backend, without a run: read and checked, then placed.

`read_inputs` reads everything but the weights' values, so that a mistake is found before them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from torchprime.config.schema import TrainConfig
from torchprime.text.terminal import only_first
from torchprime.training.backend import Backend, StepOptions
from torchprime.training.optim.optimizer import Optimizer, Parameter, Slot
from torchprime.training.setup.inputs import RunInputs
from torchprime.training.setup.model_files import pretrained_tensors
from torchprime.training.setup.recipe import checked_table, files_of, with_adapter


class NoUpdates:
    """An optimizer without state, for a backend that makes no update."""

    weight_decay = 0.0

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        return {}

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        raise AssertionError("this backend was placed without training")


def read_inputs(config: TrainConfig, say: Callable[[str], None]) -> RunInputs:
    """Read and check a config's model files and rows; weights only by their names and shapes.

    Args:
        config: names a checkpoint.
        say: prints a line for the user; called on the first process only.

    Raises:
        CheckpointError: missing or damaged files, or an adapter for another model.
        DataError: rows that can't be used.
    """
    say = only_first(say)
    files = files_of(config, weights=True)
    config = with_adapter(config, files, say)
    pretrained_tensors(files, getattr(torch, config.torch_dtype))
    return RunInputs.read(config, files, None, say)


def place_pretrained(
    inputs: RunInputs, backend: Backend, optimizer: Optimizer | None = None
) -> None:
    """Place the checkpoint's weights, with its adapter, and the state of an optimizer.

    Args:
        optimizer: makes updates; None only measures and generates.

    Raises:
        ConfigError: a model that this backend's mesh cannot hold.
    """
    config, model = inputs.config, inputs.model()
    table, _ = checked_table(config, model)
    backend.check(model, table)
    open_weights = partial(pretrained_tensors, inputs.files, inputs.dtype)
    backend.place(model, table, inputs.values(open_weights), inputs.dtype)
    options = StepOptions(loss_chunks=config.task.loss_chunks, master_weights=False)
    backend.prepare_training(optimizer or NoUpdates(), options)
