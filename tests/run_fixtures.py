"""A tiny checkpoint, its rows, and the main job run on them in this process.

All have one model, one block shape and one mesh, so that XLA compiles each kind of step once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import interrupted
import pytest
import torch
from tiny_llama import tiny_llama
from transformers import LlamaForCausalLM

from torchprime.config.compose import compose_config
from torchprime.config.entry import run_main
from torchprime.data.prepare import prepare_dataset
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.torch_xla_models.train import main
from torchprime.training.loop import DataOrder
from torchprime.training.setup.datasets import RunRows, settings_of

SPECIALS = ["<s>", "</s>", "<pad>", "<unk>"]
VOCAB = len(SPECIALS) + 256
BLOCK, BATCH = 64, 4


def make_row(number: int) -> dict[str, str]:
    """Words of different lengths, so that blocks are filled differently."""
    word = "abcdefghijklm"[number % 7 : number % 7 + 3 + number % 5]
    return {"prompt": f"say {word} twice: ", "completion": f"{word} {word}"}


@pytest.fixture(scope="session")
def make_tokenizer_folder(by_hand: SimpleNamespace) -> Callable[..., Path]:
    """A tokenizer of one token per byte and four special ones, so that ids can be told without
    us."""

    def make(folder: Path, extra_tokens: Sequence[str] = ()) -> Path:
        raw = by_hand.byte_level(SPECIALS)
        raw.add_tokens(list(extra_tokens))
        return by_hand.save(raw, folder, {"eos_token": "</s>", "pad_token": "<pad>"})

    return make


@pytest.fixture(scope="session")
def tiny(
    make_tokenizer_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A pretrained model of two layers, as transformers saves it, with its tokenizer."""
    torch.manual_seed(0)
    config = tiny_llama(
        VOCAB,
        hidden_size=16,
        intermediate_size=32,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    folder = make_tokenizer_folder(tmp_path_factory.mktemp("tiny"))
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Files of training and of held-out rows."""
    folder = tmp_path_factory.mktemp("rows")
    for name, numbers in (("train.jsonl", range(34)), ("heldout.jsonl", range(100, 109))):
        lines = [json.dumps(make_row(n)) + "\n" for n in numbers]
        (folder / name).write_text("".join(lines))
    return folder / "train.jsonl", folder / "heldout.jsonl"


@pytest.fixture(scope="session")
def command(tiny: Path, rows: tuple[Path, Path]) -> Callable[..., list[str]]:
    """A command line that trains `tiny`; later overrides win over the ones here."""

    def make(*overrides: str) -> list[str]:
        given = {
            "model.pretrained_model": tiny,
            "dataset": "file",
            "dataset.file_dataset_path": rows[0],
            "dataset.block_size": BLOCK,
            "task.global_batch_size": BATCH,
            "task.loss_chunks": 2,
            "task.max_steps": 4,
            "task.optimizer.learning_rate": 0.01,
            "ici_mesh.fsdp": 2,
            "ici_mesh.tensor": 2,
        }
        given |= dict(each.split("=", 1) for each in overrides)
        return [f"{key}={value}" for key, value in given.items()]

    return make


@pytest.fixture(scope="session")
def run() -> Callable[[list[str]], int]:
    """The entry point, as the command line calls it; the exit code."""
    return lambda argv: run_main(main, argv)


@pytest.fixture(scope="session")
def order_of() -> Callable[[list[str]], DataOrder]:
    """The batches of a command, made again from the rows, without what was kept of them."""

    def make(argv: list[str]) -> DataOrder:
        config = compose_config(argv)
        data, _ = prepare_dataset(
            RunRows.of(config).train_parts,
            load_tokenizer(Path(str(config.model.pretrained_model))),
            settings_of(config.dataset, config.seed),
        )
        return DataOrder(data, config.seed, config.task.global_batch_size)

    return make


# Runs that are cut short --------------------------------------------------------------------------


@pytest.fixture(scope="session")
def whole(
    run: Callable[[list[str]], int],
    command: Callable[..., list[str]],
    rows: tuple[Path, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A run that nothing interrupts. Not to be changed: all tests compare with it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert run(command(*interrupted.overrides(folder, rows[1]))) == 0
    return folder


@pytest.fixture
def killed_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends the next run behind a step."""
    return partial(interrupted.kill_after, monkeypatch)


@pytest.fixture
def cut_short(
    run: Callable[[list[str]], int],
    command: Callable[..., list[str]],
    rows: tuple[Path, Path],
    tmp_path: Path,
    killed_after: Callable[[int], None],
) -> Callable[..., tuple[Path, list[str]]]:
    """A run's folder after a kill behind a step, and the command that made it."""

    def make(step: int, *more: str) -> tuple[Path, list[str]]:
        folder = tmp_path / "run"
        argv = command(*interrupted.overrides(folder, rows[1]), *more)
        killed_after(step)
        with pytest.raises(interrupted.Killed):
            run(argv)
        return folder, argv

    return make
