"""A run's vocabulary: its tokenizer, and the rows of the model's embeddings for it.

A checkpoint and its tokenizer normally fit each other, and nothing is changed here. A run may ask
for new special tokens, use a tokenizer with more tokens than the model has rows, or want a round
number of rows. Then the tokenizer's folder, vocab_size and the shapes of two weights change, before
other code reads them; the values of new rows are computed when the weights are read.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

from torchprime.data.tokenizer.load import Tokenizer, load_raw, load_tokenizer
from torchprime.data.tokenizer.new_tokens import SpecialTokens, add_special_tokens
from torchprime.errors import CheckpointError
from torchprime.files.json_files import token_ids
from torchprime.models.architecture import Architecture
from torchprime.models.new_rows import NewRows

# Rows are added up to a multiple of this: the width of a TPU's vector registers, and divisible by
# every usual tensor parallel size.
MULTIPLE = 128
TOKENS_SHOWN = 8


@dataclass(frozen=True)
class VocabularyRequest:
    """A config's request for the vocabulary.

    Attributes:
        tokens: to be special tokens.
        method: initialization of rows; None refuses a tokenizer that is larger than the model.
        multiple: the number of rows is rounded up to one; None rounds only if rows are added.
        seed: of the noise in new rows.
        kept_in: the folder for a tokenizer's files with new tokens.
    """

    tokens: tuple[str, ...]
    method: Literal["mean", "zeros"] | None
    multiple: int | None
    seed: int
    kept_in: Path


class VocabularyFacts(TypedDict):
    """A changed vocabulary, for run.json.

    `tokens` and `rows` are counts, of the tokenizer and of the embeddings, and `new_rows` is the
    number of rows that were initialized by `method`. `new_tokens` and `now_special` give each
    token's id.
    """

    tokens_before: int
    tokens: int
    rows_before: int
    rows: int
    new_rows: int
    method: str | None
    new_tokens: Mapping[str, int]
    now_special: dict[str, int]


@dataclass(frozen=True)
class Vocabulary:
    """The result of a request.

    Attributes:
        tokens_before: of the tokenizer that the checkpoint was trained with.
        tokens: of the run's tokenizer.
        special: the result for each requested token.
        rows: the initialized rows; None if the checkpoint's are used unchanged.
        random: the model starts from random weights.
    """

    tokens_before: int
    tokens: int
    rows_before: int
    special: SpecialTokens
    rows: NewRows | None
    random: bool

    def describe(self) -> list[str]:
        """Return lines for the user."""
        return [f"{name:<13}{text}" for name, text in self._lines()]

    def _lines(self) -> Iterator[tuple[str, str]]:
        yield "vocabulary", f"{self._tokens()}, {self._embeddings()}"
        if self.special.new:
            yield "new tokens", _listed(self.special.new)
        if self.special.added_before:
            yield "now special", f"{_listed(self.special.added_before)} (had been added as plain)"
        if self.special.ordinary:
            listed = _listed(self.special.ordinary)
            yield "now special", f"{listed} (ordinary tokens: their ids and rows stay)"
        if self.special.kept:
            yield "kept", f"{_listed(self.special.kept)} (special tokens already)"

    def _tokens(self) -> str:
        if self.tokens == self.tokens_before:
            return f"{self.tokens:,} tokens"
        return f"{self.tokens_before:,} -> {self.tokens:,} tokens"

    def _embeddings(self) -> str:
        if self.rows is None:
            return f"embeddings {self.rows_before:,} rows as they are"
        made, grown = self.rows.made, self.rows.rows - self.rows.before
        parts = [f"embeddings {self.rows.rows:,} rows"]
        parts += [f"(resized from {self.rows.before:,})"] if grown else []
        drawn = self.random and self.rows.method == "mean"
        how = "zeros" if self.rows.method == "zeros" else "the mean of the others plus small noise"
        how = "random, like the others" if drawn else how
        unused = f", {len(self.rows.unused):,} of them unused before" if self.rows.unused else ""
        return f"{' '.join(parts)}; {len(made):,} new rows{unused}: {how}"

    def to_dict(self) -> VocabularyFacts:
        """Return the content for run.json."""
        rows = self.rows
        return {
            "tokens_before": self.tokens_before,
            "tokens": self.tokens,
            "rows_before": self.rows_before,
            "rows": self.rows_before if rows is None else rows.rows,
            "new_rows": 0 if rows is None else len(rows.made),
            "method": rows and rows.method,
            "new_tokens": self.special.new,
            "now_special": {**self.special.added_before, **self.special.ordinary},
        }


def _listed(ids: Mapping[str, int]) -> str:
    shown = [f"{text!r} {number}" for text, number in list(ids.items())[:TOKENS_SHOWN]]
    more = len(ids) - len(shown)
    return ", ".join(shown) + (f" and {more:,} more" if more else "")


class Fitted(NamedTuple):
    """A tokenizer and the model's number of rows for it; `vocabulary` if that was requested."""

    tokenizer: Tokenizer
    rows: int
    vocabulary: Vocabulary | None


def fit_vocabulary(
    tokenizer_folder: Path,
    checkpoint: Path | None,
    architecture: Architecture,
    hf_config: Mapping[str, Any],
    request: VocabularyRequest | None,
) -> Fitted:
    """Load the tokenizer, with new tokens if requested, and check that the model has rows for it.

    Args:
        checkpoint: the folder of the model's weights; None if they are random.
        architecture: as `hf_config`, the model's config.json, says it.

    Raises:
        CheckpointError: no tokenizer, or one that does not fit the model.
    """
    special = SpecialTokens(tokenizer_folder)
    if request is not None and request.tokens:
        special = add_special_tokens(tokenizer_folder, request.tokens, request.kept_in)
    tokenizer = load_tokenizer(special.folder)
    check_vocabulary(
        tokenizer, architecture, hf_config, may_grow=request is not None and bool(request.method)
    )
    rows_before = architecture.vocab_size
    if request is None or request.method is None:
        return Fitted(tokenizer, rows_before, None)
    known = _known_tokens(tokenizer, special, tokenizer_folder, checkpoint)
    rows = _count_rows(rows_before, tokenizer.max_id + 1, request.multiple)
    fresh = set(tokenizer.vocabulary().values()) - set(known.values())
    unused = tuple(sorted(number for number in fresh if number < rows_before))
    made = None
    if rows > rows_before or unused:
        made = NewRows(request.method, rows_before, rows, unused, request.seed)
    vocabulary = Vocabulary(
        tokens_before=len(known),
        tokens=tokenizer.vocab_size,
        rows_before=rows_before,
        special=special,
        rows=made,
        random=checkpoint is None,
    )
    return Fitted(tokenizer, rows, vocabulary)


def _count_rows(before: int, tokens: int, multiple: int | None) -> int:
    """Return the number of rows, never fewer than before."""
    needed = max(before, tokens)
    multiple = multiple or (MULTIPLE if needed > before else 1)
    return math.ceil(needed / multiple) * multiple


def _known_tokens(
    tokenizer: Tokenizer, special: SpecialTokens, source: Path, checkpoint: Path | None
) -> Mapping[str, int]:
    """Return the tokens that the checkpoint was trained with: those of its own tokenizer if it has
    one, else those of the given one.

    Raises:
        CheckpointError: the run's tokenizer gives another id to one of them.
    """
    ids = tokenizer.vocabulary()
    before = {text: number for text, number in ids.items() if text not in special.new}
    if (
        checkpoint is None
        or checkpoint == source
        or not os.path.lexists(checkpoint / "tokenizer.json")
    ):
        return before
    own = load_raw(checkpoint)[0].get_vocab(with_added_tokens=True)
    moved = [text for text, number in own.items() if ids.get(text, number) != number]
    if moved:
        first = moved[0]
        raise CheckpointError(
            f"model.tokenizer_name: the tokenizer in {source} does not extend the checkpoint's "
            f"own: {len(moved):,} of its {len(own):,} tokens have another id, such as {first!r}: "
            f"{own[first]} in the checkpoint, {ids[first]} here. The rows of the checkpoint's "
            "embeddings would belong to other tokens. Give a tokenizer made from the checkpoint's "
            "own, or null."
        )
    return own


def check_vocabulary(
    tokenizer: Tokenizer,
    architecture: Architecture,
    hf_config: Mapping[str, Any],
    *,
    may_grow: bool = False,
) -> None:
    """Check that no id is past the embedding, which XLA would clamp silently, and that stop tokens
    agree.

    A model may have more rows than the tokenizer has tokens (padding to a round number), never
    fewer, unless rows are to be added.
    """
    if tokenizer.max_id >= architecture.vocab_size and not may_grow:
        raise CheckpointError(
            f"The tokenizer in {tokenizer.folder} has ids up to {tokenizer.max_id}, but the "
            f"model's vocab_size is {architecture.vocab_size}. Set model.tokenizer_name to the "
            "tokenizer of this model (or null to use the one beside its weights). If the tokenizer "
            "extends the model's, set model.resize_embeddings=mean to add rows for its tokens."
        )
    stops = token_ids(hf_config, "eos_token_id", "config.json")
    known: Sequence[int] = sorted({*stops, *tokenizer.generation_eos_ids})
    if architecture.vocab_size > tokenizer.max_id + 1 + 1024 and tokenizer.eos_id not in known:
        raise CheckpointError(
            f"The tokenizer in {tokenizer.folder} has {tokenizer.vocab_size} tokens and stops with "
            f"id {tokenizer.eos_id}; the model has {architecture.vocab_size} rows and stops with "
            f"{known or 'no id'}: they do not belong together. Set model.tokenizer_name to "
            "the model's own tokenizer."
        )
