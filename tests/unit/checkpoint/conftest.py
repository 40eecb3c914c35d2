"""Tiny checkpoints made by transformers itself, so that nothing is compared with our own output.

Every family has its switches on: rope scaling, tied and untied embeddings, biases, q/k norms.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchprime.checkpoint.hf_read import SafetensorsReader

SIZES = dict(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    "llama_tied": ("Llama", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "llama_untied": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=3e4, factor=2.0)),
    ),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": (
        "Qwen3",
        dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    ),
    "mistral": ("Mistral", dict(sliding_window=16)),
}
STOP, END = 0, 1  # ids of <|end|> and <|other|>


@dataclass(frozen=True)
class TinyCheckpoint:
    folder: Path
    config: dict[str, Any]
    reader: SafetensorsReader
    spec: dict[str, tuple[int, ...]]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that keeps numbers whole, unlike Qwen's, which cuts them into digits."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["Question: Tom has 12 apples and 345. Answer: the end"] * 9, trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|end|>",
        "backend": "tokenizers",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_checkpoint(folder: Path, family: str, **changes: Any) -> TinyCheckpoint:
    """A random model of a family, saved by transformers."""
    name, switches = FAMILIES[family]
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **switches, **changes})
    torch.manual_seed(7)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():  # no ones and zeros: a swapped norm or bias must show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> TinyCheckpoint:
    reader = SafetensorsReader(folder)
    config = json.loads((folder / "config.json").read_text())
    return TinyCheckpoint(folder, config, reader, {n: s for n, (s, _) in reader.names().items()})


@pytest.fixture(scope="session")
def stories(shared_dir: Path) -> TinyCheckpoint:
    """A genuinely pretrained Llama with a real tokenizer."""
    return open_checkpoint(shared_dir / "models" / "stories260K")


@pytest.fixture(scope="session", params=list(FAMILIES))
def any_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama_untied")


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("tied_llama"), "llama_tied")


@pytest.fixture
def export(tokenizer_folder: Path):
    """Call export_hf with everything but the target and the checkpoint filled in."""
    from torchprime.checkpoint.export import export_hf

    def run(out: Path, checkpoint: TinyCheckpoint, **changes: Any):
        arguments: dict[str, Any] = dict(
            weights=checkpoint.reader.weights(checkpoint.spec),
            spec=checkpoint.spec,
            config=checkpoint.config,
            dtype=torch.float32,
            tokenizer_folder=tokenizer_folder,
            eos_token_id=STOP,
            generation_config=None,
            card="# card\n",
            max_shard_bytes=10**9,
        )
        return export_hf(out, **{**arguments, **changes})

    return run
