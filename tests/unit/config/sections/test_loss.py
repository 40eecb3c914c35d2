"""Combinations of losses that make no sense are one message."""

from __future__ import annotations

import pytest

from torchprime.config.sections.loss import LossConfig
from torchprime.config.sections.task import TaskConfig
from torchprime.errors import ConfigError


def test_smoothing_with_dft_is_refused() -> None:
    said = r"task.loss.label_smoothing: given 0.1, expected 0, since task.loss.dft=true"
    with pytest.raises(ConfigError, match=said):
        LossConfig(dft=True, label_smoothing=0.1)


def test_dft_by_liger_is_refused() -> None:
    loss = LossConfig(dft=True, z_loss=1e-4)
    with pytest.raises(ConfigError, match="task.loss_kernel: given 'liger', expected auto or chun"):
        TaskConfig("sft", 8, max_steps=1, loss=loss, loss_kernel="liger")
    assert TaskConfig("sft", 8, max_steps=1, loss=loss, loss_kernel="chunked").loss is loss


def test_the_log_names_what_differs_from_the_defaults() -> None:
    assert LossConfig().describe() == ""
    chosen = LossConfig(average="examples", z_loss=1e-4, dft=True)
    assert chosen.describe() == "average='examples', z_loss=0.0001, dft=true"
