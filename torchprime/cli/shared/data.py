"""A config's data, prepared without a device or the model's weights."""

from __future__ import annotations

from typing import NamedTuple

from torchprime.config.schema import TrainConfig
from torchprime.data.blocks.budget import batch_budget
from torchprime.data.templates.render import ChatTemplate
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.terminal import print_lines, say
from torchprime.training.setup.datasets import RunData, prepare_run_data, template_of
from torchprime.training.setup.model_files import ModelFiles
from torchprime.training.setup.recipe import files_of


class Offline(NamedTuple):
    """The config's data and tokenizer for the data commands."""

    data: RunData
    files: ModelFiles
    template: ChatTemplate | None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.files.tokenizer


def load(config: TrainConfig) -> Offline:
    """Prepare the config's rows, or load them from the cache; messages go to stderr."""

    files = files_of(config, weights=False)
    for line in files.vocabulary.describe() if files.vocabulary else ():
        say(line)
    template = template_of(config.dataset, files.tokenizer)
    return Offline(prepare_run_data(config, files.tokenizer, template, say), files, template)


def prepare_offline(config: TrainConfig) -> int:
    """Prepare the rows, and print the size of one update."""
    data = load(config).data.train
    budget = batch_budget(data, config.seed, config.task.global_batch_size)
    supervised = budget["supervised_tokens_per_update"]
    line = (
        f"{budget['blocks']:,} blocks of {budget['block_size']:,}, {budget['steps_per_epoch']:,} "
        f"steps per epoch at {budget['blocks_per_update']:,} blocks per update; supervised tokens "
        f"per update: mean {supervised['mean']:,.0f}, min {supervised['min']:,}, max "
        f"{supervised['max']:,}"
    )
    print_lines([line])
    return 0
