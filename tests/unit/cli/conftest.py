"""A tokenizer of each kind, whose pieces are known, and a run's command line.

The commands around a run read no weights: a checkpoint's config.json is enough for them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer

SPECIALS = ("<|start|>", "<|end|>")
# Tokens that would be markup if they were not escaped, in an element and in an attribute.
MARKUP = ("</b><script>alert(1)</script>", '" onclick="alert(2)')
CHAT = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
MERGES = [("▁", "t"), ("▁t", "o")]  # of the two like sentencepiece
# The config of a checkpoint with this tokenizer's size.
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


@pytest.fixture(scope="session")
def byte_level(by_hand: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    """Its merges make " to", and a token of a space and the first two bytes of €."""
    raw = by_hand.byte_level(SPECIALS, [("Ġ", "t"), ("Ġt", "o"), ("Ġ", "â"), ("Ġâ", "Ĥ")])
    raw.add_tokens(list(MARKUP))
    settings = {"eos_token": SPECIALS[1], "chat_template": CHAT}
    folder = by_hand.save(raw, tmp_path_factory.mktemp("bytes"), settings)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def sentencepiece(by_hand: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    raw = by_hand.sentencepiece(SPECIALS, MERGES, letters=["\n", "é", "€"])
    folder = by_hand.save(raw, tmp_path_factory.mktemp("pieces"), {"eos_token": SPECIALS[1]})
    return load_tokenizer(folder)


@pytest.fixture(scope="session")
def byte_fallback(by_hand: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    raw = by_hand.sentencepiece(SPECIALS, MERGES, byte_fallback=True)
    folder = by_hand.save(raw, tmp_path_factory.mktemp("fallback"), {"eos_token": SPECIALS[1]})
    return load_tokenizer(folder)


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
