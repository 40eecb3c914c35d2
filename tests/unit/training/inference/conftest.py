"""A config with rows and graders, and an engine without a model whose answers a test foresees."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from torchprime.config.compose import compose_config
from torchprime.config.schema import TrainConfig
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.evaluation.heldout import HeldoutLoss
from torchprime.generation.decode import Answer, GenerateOptions
from torchprime.training.inference.engine import Engine, OpenEngine
from torchprime.training.processes import OneProcess
from torchprime.training.setup.inputs import RunInputs

WORDS = ("yes", "no", "well, yes", "yes", "yes yes", "cut")


@dataclass
class Parrot:
    """Answers by the prompts' numbers in the noise: some of WORDS, and `cut` is cut off."""

    encode: Callable[[str], list[int]]
    dies_after: int | None = None  # calls
    calls: list[int] = field(default_factory=list)

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        if len(self.calls) == self.dies_after:
            raise KeyboardInterrupt
        self.calls.append(len(prompts))
        assert options.numbers is not None and len(set(options.numbers)) == len(prompts)
        words = [WORDS[(number + options.seed) % len(WORDS)] for number in options.numbers]
        return [Answer(self.encode(word), word != "cut") for word in words]


def loss(data: PackedDataset, batch_size: int) -> HeldoutLoss:
    return HeldoutLoss(1.5, None)


@pytest.fixture
def parrot() -> Callable[..., tuple[OpenEngine, list[int]]]:
    """Make an engine, and the list of the sizes of its calls."""

    def make(dies_after: int | None = None) -> tuple[OpenEngine, list[int]]:
        calls: list[int] = []

        @contextmanager
        def open_engine(inputs: RunInputs) -> Iterator[Engine]:
            def encode(text: str) -> list[int]:
                return inputs.files.tokenizer.encode_ids([text])[0]

            made = Parrot(encode, dies_after, calls)
            yield Engine("parrot", made, loss, OneProcess())

        return open_engine, calls

    return make


@pytest.fixture
def config(command: Callable[..., list[str]], rows: tuple[Path, Path]) -> TrainConfig:
    """34 training rows and 9 held-out ones; a right answer says yes in at most two words."""
    return compose_config(
        command(
            "eval=file",
            f"eval.file_dataset_path={rows[1]}",
            "eval.generate.max_examples=9",
            "eval.generate.batch_size=12",
            "eval.generate.max_new_tokens=16",
            "eval.graders=[{name: says_yes, kind: regex, pattern: yes}, "
            "{name: short, kind: regex, pattern: '^\\S+( \\S+)?$'}, "
            "{name: characters, kind: length, unit: chars}]",
        )
    )
