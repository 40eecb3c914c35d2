"""A config's data, prepared without a device or the model's weights."""

from __future__ import annotations

from typing import NamedTuple

from torchprime.config.schema import TrainConfig
from torchprime.data.templates.render import ChatTemplate
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.text.terminal import say
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
