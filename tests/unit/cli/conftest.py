"""Tokenizers of each kind, built by hand so that their pieces are known, and a run's command line.

The commands around a run read no weights: a checkpoint's config.json is enough for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from torchprime.data.tokenizer import Tokenizer, load_tokenizer

SPECIALS = ("<|start|>", "<|end|>")
# Tokens that would be markup if they were not escaped, in an element and in an attribute.
MARKUP = ("</b><script>alert(1)</script>", '" onclick="alert(2)')
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# What a checkpoint of this tokenizer's size would say.
CONFIG = {
    "model_type": "llama",
    "vocab_size": 272,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "eos_token_id": SPECIALS.index("<|end|>"),
}


def _byte_level(merges: Sequence[tuple[str, str]]) -> tokenizers.Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_tokens(list(MARKUP))
    return raw


def _sentencepiece(fallback: bool) -> tokenizers.Tokenizer:
    """A space in front of every text; what is not ASCII becomes bytes, or is left out."""
    letters = [chr(c) for c in range(33, 127)] + ([] if fallback else ["\n", "é", "€"])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if fallback else []
    vocab = {token: i for i, token in enumerate([*SPECIALS, "▁", *letters, *bytes_])}
    merges = [("▁", "t"), ("▁t", "o")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, byte_fallback=fallback))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole = [decoders.ByteFallback()] if fallback else []
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), *whole, decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


def save(raw: tokenizers.Tokenizer, folder: Path, template: str | None = None) -> Path:
    raw.add_special_tokens(list(SPECIALS))
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": SPECIALS[1], "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its merges make " to", and a token of a space and the first two bytes of €."""
    merges = [("Ġ", "t"), ("Ġt", "o"), ("Ġ", "â"), ("Ġâ", "Ĥ")]
    folder = save(_byte_level(merges), tmp_path_factory.mktemp("bytes"), CHAT)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save(_sentencepiece(False), tmp_path_factory.mktemp("pieces")))


@pytest.fixture(scope="session")
def byte_fallback(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(save(_sentencepiece(True), tmp_path_factory.mktemp("fallback")))


@pytest.fixture
def command(byte_level: Tokenizer, tmp_path: Path) -> Callable[..., list[str]]:
    """`torchprime inspect` on rows, given as records or as overrides; later ones win."""

    def make(rows: Sequence[object] = (), *overrides: str) -> list[str]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        given = {
            "model.pretrained_model": byte_level.folder,
            "task.max_steps": 4,
            "task.global_batch_size": 2,
            "dataset": "file",
            "dataset.file_dataset_path": path,
            "dataset.block_size": 256,
            "dataset.prepared_dir": tmp_path / "prepared",
            "output_dir": tmp_path / "out",
            "run_name": "mine",
        }
        given |= dict(each.split("=", 1) for each in overrides)
        return ["inspect", *(f"{key}={value}" for key, value in given.items())]

    return make
