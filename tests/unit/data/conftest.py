"""Tiny tokenizers built by hand, so that every merge in them is known, and ways to write files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from torchprime.data.tokenizer import Tokenizer, load_tokenizer

SPECIALS = ("<s>", "</s>", "<pad>")


def save_tokenizer(
    folder: Path, raw: tokenizers.Tokenizer, config: dict[str, object] | None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def byte_level(merges: Sequence[tuple[str, str]] = (), trim_offsets: bool = False):
    """Byte-level BPE without a splitting regex: these merges happen anywhere, and only these."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIALS, *alphabet])}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    if trim_offsets:
        raw.post_processor = processors.ByteLevel(trim_offsets=True)
    raw.add_special_tokens(list(SPECIALS))
    return raw


def sentencepiece_like(merges: Sequence[tuple[str, str]] = ()):
    """As converted from sentencepiece: a space is put in front of every text, "_" stands for it."""
    letters = [chr(c) for c in range(33, 127)]
    vocab = {token: i for i, token in enumerate([*SPECIALS, "▁", "\n", *letters])}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=list(merges)))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens(list(SPECIALS))
    return raw


def begin_with_bos(raw: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", raw.token_to_id("<s>"))]
    )
    return raw


@pytest.fixture
def build() -> SimpleNamespace:
    """The functions above, for tests: a conftest is not for importing."""
    return SimpleNamespace(
        byte_level=byte_level,
        sentencepiece_like=sentencepiece_like,
        begin_with_bos=begin_with_bos,
        save=save_tokenizer,
    )


@pytest.fixture
def make_tokenizer(tmp_path: Path) -> Callable[..., Tokenizer]:
    """Save a raw tokenizer with these settings and load it back the way a run does."""

    def make(raw: tokenizers.Tokenizer, **config: object) -> Tokenizer:
        folder = tmp_path / f"tokenizer{len(list(tmp_path.iterdir()))}"
        return load_tokenizer(save_tokenizer(folder, raw, {"eos_token": "</s>"} | config))

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
