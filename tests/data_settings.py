"""Settings that make examples of rows: the schema's defaults, with what a test changes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torchprime.config.sections.dataset import DatasetConfig
from torchprime.data.blocks.chunks import Settings
from torchprime.training.setup.datasets import settings_of


def settings(block_size: int, **changed: Any) -> Settings:
    dataset = DatasetConfig(file_dataset_path="rows.jsonl", block_size=block_size)
    return replace(settings_of(dataset, seed=0), **changed)
