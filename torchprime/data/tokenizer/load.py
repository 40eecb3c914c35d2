"""The tokenizer as its own files define it: the `tokenizers` library on tokenizer.json.

transformers may replace parts of a tokenizer.json by its defaults for the model type, so ids are
taken from the file itself. Texts are encoded without special tokens and in batches, so that the
library uses its threads. The modules in data/tokens decide the places of BOS and EOS; this module
finds their ids, and if this tokenizer begins a text with BOS.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import tokenizers

from torchprime.data.tokenizer.encoded import Encoded, LibraryEncoded
from torchprime.data.tokenizer.words import WordEncoder, byte_characters
from torchprime.errors import CheckpointError
from torchprime.files.json_files import read_json_if_there, token_ids
from torchprime.raw_tokenizer import encoding_faults, library_faults, load_tokenizer_json

PROBE = "a"
REPLACEMENT = "\ufffd"  # the decoder's output for bytes that are no character


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of ids only. `pad_id` is EOS's id if there is no padding token."""

    vocab_size: int
    bos_id: int | None
    eos_id: int
    pad_id: int
    add_bos: bool
    generation_eos_ids: tuple[int, ...]
    max_id: int
    folder: Path
    _raw: tokenizers.Tokenizer = field(repr=False)
    _fingerprint: str = field(repr=False)

    def encode_batch(self, texts: Sequence[str]) -> list[Encoded]:
        """Return ids and character spans of every text, without special tokens."""
        by_words = [self._words and self._words.encode(text) for text in texts]
        rest = [text for text, done in zip(texts, by_words, strict=True) if done is None]
        with self._faults():
            others = iter(self._raw.encode_batch(rest, add_special_tokens=False) if rest else ())
        return [done or LibraryEncoded(next(others)) for done in by_words]

    def encode_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the same ids without spans, which the library computes faster."""
        by_words = [self._words and self._words.encode(text) for text in texts]
        rest = [text for text, done in zip(texts, by_words, strict=True) if done is None]
        raw = self._raw
        with self._faults():
            others = iter(raw.encode_batch_fast(rest, add_special_tokens=False) if rest else ())
        return [(done or next(others)).ids for done in by_words]

    def _faults(self) -> AbstractContextManager[None]:
        return encoding_faults(f"the tokenizer in {self.folder} fails on a text")

    def joint_ids(self, prompt: str, completion: str) -> tuple[list[int], list[int]] | None:
        """Return the ids of prompt and completion in their joint text, or None.

        No token may cross the boundary, and the prompt's ids must be those it has alone. None means
        only that the fast check could not show this.
        """
        return self._words and self._words.joint_ids(prompt, completion)

    @cached_property
    def _words(self) -> WordEncoder | None:
        return WordEncoder.of(self._raw)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return a model's input for this prompt: its ids, after BOS if that is used."""
        return self.with_bos(self.encode_ids([prompt])[0])

    def with_bos(self, ids: list[int]) -> list[int]:
        """Put BOS first, once: a text that begins with BOS already is unchanged."""
        if not self.add_bos or self.bos_id is None or ids[:1] == [self.bos_id]:
            return ids
        return [self.bos_id, *ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        with self._faults():
            return self._raw.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def decode_batch(
        self, sequences: Sequence[Sequence[int]], skip_special_tokens: bool = True
    ) -> list[str]:
        lists = [list(ids) for ids in sequences]
        with self._faults():
            return self._raw.decode_batch(lists, skip_special_tokens=skip_special_tokens)

    def token_text(self, token_id: int) -> str | None:
        """Return the vocabulary's spelling of this token; None for an unknown id."""
        return self._raw.id_to_token(token_id)

    def pieces(self, ids: Sequence[int]) -> list[str]:
        """Return the text that each token adds when it follows others.

        A token may be a part of a character; its bytes then become lone surrogates, as in Python's
        "surrogateescape" handler. The pieces, joined and encoded with that handler, are exactly the
        bytes of the text.
        """
        ids = list(ids)
        distinct = list(dict.fromkeys(ids))
        # A decoder may strip the leading space of a text, so no token is decoded as the first one.
        before = self._raw.encode(PROBE, add_special_tokens=False).ids[-1:]
        alone = self.decode(before, False)
        behind = self.decode_batch([[*before, i] for i in distinct], False)
        found = {
            i: _piece(text.removeprefix(alone), self._raw.id_to_token(i) or f"<id {i}>")
            for i, text in zip(distinct, behind, strict=True)
        }
        return [found[i] for i in ids]

    @property
    def special_tokens(self) -> frozenset[str]:
        """The texts that become one control token wherever they occur, such as <|im_end|>."""
        added = self._raw.get_added_tokens_decoder().values()
        return frozenset(token.content for token in added if token.special)

    def vocabulary(self) -> dict[str, int]:
        """Return the id of every token, including added ones."""
        return self._raw.get_vocab(with_added_tokens=True)

    def fingerprint(self) -> str:
        """Return a sha256 of tokenizer.json and of the settings that change ids."""
        return self._fingerprint


@lru_cache(maxsize=1)
def _byte_of() -> dict[str, int]:
    """Return the characters that byte-level vocabularies use for bytes, and their bytes."""
    return {character: byte for byte, character in enumerate(byte_characters())}


def _piece(text: str, token: str) -> str:
    """Return a token's text, from its bytes if decoding it alone lost some."""
    if not text:
        return token
    if REPLACEMENT not in text or REPLACEMENT in token:
        return text
    fallback = re.fullmatch("<0x([0-9A-F]{2})>", token)
    if fallback:
        return bytes.fromhex(fallback[1]).decode("utf-8", "surrogateescape")
    byte_of = _byte_of()
    if all(character in byte_of for character in token):
        return bytes(byte_of[c] for c in token).decode("utf-8", "surrogateescape")
    return text


def load_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json and the settings beside it; a missing file is a CheckpointError."""
    folder = Path(folder)
    raw, raw_bytes = load_raw(folder)
    settings = read_settings(folder)
    vocab = raw.get_vocab(with_added_tokens=True)
    if not vocab:
        raise CheckpointError(f"the tokenizer in {folder} has no tokens. Fetch it again")

    eos_id = _eos_id(settings, vocab, folder)
    bos_id, add_bos = _bos(raw, settings, vocab, eos_id, folder)
    pad_id = vocab.get(token_named(settings, "pad_token") or "", eos_id)

    # It is no longer needed: data/tokens decides how a text begins and ends, and a post-processor
    # that trims offsets would hide where a token really starts.
    raw.post_processor = None  # pyright: ignore[reportAttributeAccessIssue]
    rules = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id, "add_bos": add_bos}
    digest = hashlib.sha256(raw_bytes + json.dumps(rules, sort_keys=True).encode())
    return Tokenizer(
        vocab_size=raw.get_vocab_size(with_added_tokens=True),
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=pad_id,
        add_bos=add_bos,
        generation_eos_ids=_generation_eos_ids(folder),
        max_id=max(vocab.values()),
        folder=folder,
        _raw=raw,
        _fingerprint=digest.hexdigest(),
    )


def load_raw(folder: Path) -> tuple[tokenizers.Tokenizer, bytes]:
    """Read tokenizer.json with the tokenizers library; return the tokenizer and the file's bytes.

    Raises:
        CheckpointError: there is no such file, or the library cannot load it.
    """
    path = folder / "tokenizer.json"
    if not os.path.lexists(path):
        if not folder.is_dir():
            raise CheckpointError(f"no tokenizer: the folder {folder} does not exist")
        others = sorted(p.name for p in folder.iterdir() if "token" in p.name or "vocab" in p.name)
        found = f"it has {', '.join(others)}" if others else "it has no tokenizer files at all"
        raise CheckpointError(
            f'no tokenizer.json in {folder} ({found}). Convert with: python -c "from transformers '
            f"import AutoTokenizer; AutoTokenizer.from_pretrained('{folder}')"
            f".save_pretrained('{folder}')\", or set model.tokenizer_name to a folder that has one"
        )
    return load_tokenizer_json(path)


def read_settings(folder: Path) -> dict[str, Any]:
    """Return tokenizer_config.json; the older special_tokens_map.json fills missing keys."""
    settings = read_json_if_there(folder / "special_tokens_map.json")
    newer = read_json_if_there(folder / "tokenizer_config.json")
    return settings | {key: value for key, value in newer.items() if value is not None}


def token_named(settings: dict[str, Any], name: str) -> str | None:
    """Return a special token's text; it is stored as a string or as an object with `content`."""
    value = settings.get(name)
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) and value else None


def _eos_id(settings: dict[str, Any], vocab: dict[str, int], folder: Path) -> int:
    token = token_named(settings, "eos_token")
    if token is None:
        raise CheckpointError(
            f"the tokenizer in {folder} names no eos_token, so no answer could be taught to end. "
            f'Add "eos_token": "<its text>" to {folder / "tokenizer_config.json"}'
        )
    return _id_of(token, "eos_token", vocab, folder)


def _id_of(token: str, name: str, vocab: dict[str, int], folder: Path) -> int:
    if token not in vocab:
        raise CheckpointError(
            f"{name} {token!r} of the tokenizer in {folder} is not in its vocabulary of "
            f"{len(vocab):,} tokens. Correct {name} in tokenizer_config.json"
        )
    return vocab[token]


def _bos(
    raw: tokenizers.Tokenizer,
    settings: dict[str, Any],
    vocab: dict[str, int],
    eos_id: int,
    folder: Path,
) -> tuple[int | None, bool]:
    """Return BOS's id, and True if a text begins with it.

    An explicit add_bos_token decides (as in transformers 5); otherwise the post-processor of
    tokenizer.json does.
    """
    leading = _leading_specials(raw, folder)
    if len(leading) > 1:
        names = " ".join(str(raw.id_to_token(i)) for i in leading)
        raise CheckpointError(
            f"the tokenizer in {folder} begins every text with {len(leading)} tokens ({names}); "
            f"at most one, BOS, is supported"
        )
    token = token_named(settings, "bos_token")
    asked = settings.get("add_bos_token")
    if not isinstance(asked, bool | None):
        raise CheckpointError(
            f"{folder / 'tokenizer_config.json'}: add_bos_token is {asked!r:.100}, expected true, "
            "false or null"
        )
    if token is None:
        bos_id = leading[0] if leading else None
        return bos_id, bos_id is not None and asked is not False
    add_bos = bool(leading) if asked is None else asked
    if not add_bos:
        return vocab.get(token), False
    bos_id = _id_of(token, "bos_token", vocab, folder)
    if leading and leading[0] != bos_id:
        raise CheckpointError(
            f"tokenizer_config.json in {folder} names bos_token {token!r}, but tokenizer.json "
            f"begins every text with {raw.id_to_token(leading[0])!r}. Make them agree"
        )
    return bos_id, True


def _leading_specials(raw: tokenizers.Tokenizer, folder: Path) -> list[int]:
    """Return the ids that the post-processor puts before a text."""
    with library_faults(f"the tokenizer in {folder} fails on a text"):
        full = raw.encode(PROBE).ids
        bare = raw.encode(PROBE, add_special_tokens=False).ids
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []


def _generation_eos_ids(folder: Path) -> tuple[int, ...]:
    """Return the ids that end generation; for information only: training supervises eos_token."""
    path = folder / "generation_config.json"
    return tuple(token_ids(read_json_if_there(path), "eos_token_id", str(path)))
