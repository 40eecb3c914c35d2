"""Tiny tokenizers whose every merge is known, real ones, and ways to write files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import processors

from torchprime.data.tokenizer.load import Tokenizer, load_tokenizer

SPECIALS = ("<s>", "</s>", "<pad>")
Merges = Sequence[tuple[str, str]]


def begin_with_bos(raw: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return raw


@pytest.fixture
def build(by_hand: SimpleNamespace) -> SimpleNamespace:
    """Raw tokenizers with the special tokens <s>, </s> and <pad>, and the saving of them."""

    def byte_level(merges: Merges = (), trim_offsets: bool = False) -> tokenizers.Tokenizer:
        raw = by_hand.byte_level(SPECIALS, merges)
        if trim_offsets:
            raw.post_processor = processors.ByteLevel(trim_offsets=True)
        return raw

    def sentencepiece_like(merges: Merges = ()) -> tokenizers.Tokenizer:
        return by_hand.sentencepiece(SPECIALS, merges, letters=["\n"])

    return SimpleNamespace(
        byte_level=byte_level,
        sentencepiece_like=sentencepiece_like,
        begin_with_bos=begin_with_bos,
        save=by_hand.save,
    )


@pytest.fixture
def make_tokenizer(by_hand: SimpleNamespace, tmp_path: Path) -> Callable[..., Tokenizer]:
    """Save a raw tokenizer with these settings and load it back the way a run does."""

    def make(raw: tokenizers.Tokenizer, **config: object) -> Tokenizer:
        folder = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
        return load_tokenizer(by_hand.save(raw, folder, {"eos_token": "</s>"} | config))

    return make


@pytest.fixture(params=["stories260K", "qwen3", "mistral_v3", "gpt2"])
def real_tokenizer(request: pytest.FixtureRequest, shared_dir: Path, tmp_path: Path) -> Tokenizer:
    """Sentencepiece with and without merges over spaces, byte-level BPE with and without NFC."""
    given: dict[str, dict[str, object] | None] = {
        "stories260K": None,
        "qwen3": None,
        "mistral_v3": {"bos_token": "<s>", "eos_token": "</s>"},
        "gpt2": {"eos_token": "<|endoftext|>"},
    }
    kind = "models" if request.param == "stories260K" else "tokenizers"
    source, config = shared_dir / kind / request.param, given[request.param]
    if config is None:
        return load_tokenizer(source)
    (tmp_path / "tokenizer.json").symlink_to(source / "tokenizer.json")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(tmp_path)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: object, name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write
