"""A command that makes no step composes configs that name neither a length nor a model."""

from __future__ import annotations

from functools import partial

import pytest

from torchprime.cli.shared.without_training import assume_model, assume_steps
from torchprime.config.compose import compose_config
from torchprime.errors import ConfigError

ROWS = ["task=sft", "dataset=file", "dataset.file_dataset_path=rows.jsonl", "mesh=single"]
BASE = [*ROWS, "model.pretrained_model=base"]


def test_a_length_is_assumed_where_there_is_none() -> None:
    with pytest.raises(ConfigError, match="task.max_steps and task.num_epochs"):
        compose_config(BASE)
    assert compose_config(BASE, assume_steps).task.max_steps == 1
    given = compose_config([*BASE, "task.num_epochs=2"], assume_steps).task
    assert (given.max_steps, given.num_epochs) == (None, 2)


def test_the_models_own_name_is_assumed_where_there_is_none() -> None:
    fill = partial(assume_model, model="mine")
    with pytest.raises(ConfigError, match=r"model\.pretrained_model"):
        compose_config(ROWS, assume_steps)
    assert compose_config(ROWS, fill).model.pretrained_model == "mine"
    assert compose_config(BASE, fill).model.pretrained_model == "base"
