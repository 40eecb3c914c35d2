"""Values that a command needs only in order to train, assumed where it does not train."""

from __future__ import annotations

from omegaconf import DictConfig


def assume_steps(composed: DictConfig) -> None:
    """Give a config without a length one step, which nobody makes."""
    task = composed.task
    if task.max_steps is None and task.num_epochs is None:
        task.max_steps = 1


def assume_model(composed: DictConfig, model: str) -> None:
    """Give a config without a length or a model the command's own model."""
    assume_steps(composed)
    if composed.model.pretrained_model is None:
        composed.model.pretrained_model = model
