"""Tokenizers built by hand, so that every token and merge in them is known; a disk that is soon
full; processes that start at once."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers
from forks import ForkServer
from tokenizers import decoders, models, normalizers, pre_tokenizers

Merges = Sequence[tuple[str, str]]


def _bpe(
    tokens: Sequence[str], merges: Merges, specials: Sequence[str], byte_fallback: bool
) -> tokenizers.Tokenizer:
    """Ids go by place: the special tokens, the tokens, what is merged."""
    vocab = {token: i for i, token in enumerate([*specials, *tokens])}
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=list(merges), byte_fallback=byte_fallback)
    )
    raw.add_special_tokens(list(specials))
    return raw


def byte_level(specials: Sequence[str], merges: Merges = ()) -> tokenizers.Tokenizer:
    """Byte-level BPE without a splitting regex: these merges happen anywhere, and only these."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = _bpe(alphabet, merges, specials, byte_fallback=False)
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return raw


def sentencepiece(
    specials: Sequence[str],
    merges: Merges = (),
    letters: Sequence[str] = (),
    byte_fallback: bool = False,
) -> tokenizers.Tokenizer:
    """As converted from sentencepiece: a space is put in front of every text, "▁" stands for it.

    It knows printable ASCII and `letters`; what else there is becomes bytes, or is left out.
    """
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    tokens = ["▁", *letters, *(chr(c) for c in range(33, 127)), *bytes_]
    raw = _bpe(tokens, merges, specials, byte_fallback)
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    whole = [decoders.ByteFallback()] if byte_fallback else []
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), *whole, decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return raw


def save(raw: tokenizers.Tokenizer, folder: Path, settings: Mapping[str, Any] | None) -> Path:
    """As a checkpoint's folder has it; without tokenizer_config.json if there are no settings."""
    folder.mkdir(parents=True, exist_ok=True)
    raw.save(str(folder / "tokenizer.json"))
    if settings is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="session")
def by_hand() -> SimpleNamespace:
    """The functions above, for tests: a conftest is not for importing."""
    return SimpleNamespace(byte_level=byte_level, sentencepiece=sentencepiece, save=save)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of four megabytes."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    try:
        mounted = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount here: {error}")
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
    yield place
    # Lazily: weights that were mapped may wait for the garbage collector.
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="session")
def fork_server() -> Iterator[ForkServer]:
    """Starts ranks of the native backend without their imports."""
    server = ForkServer()
    yield server
    server.close()
