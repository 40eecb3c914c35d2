"""Rows become examples: ids, and which of them the loss is asked about.

    ids        = BOS? + prompt + completion + EOS
    supervised = which of these ids are to be predicted

A model that answers is given exactly the ids of the prompt alone, so training must use those ids
and no others. Tokens like to merge across the place where prompt and completion meet (and
sentencepiece likes to put a space in front of a completion tokenized alone), so the boundary is
established, never guessed from a length:

1. joint: the prompt's ids begin the ids of the whole text, and no token crosses the boundary.
2. separate: prompt and completion tokenized apart, if together they decode to the same text.
3. context: the completion tokenized after a character it does not merge with, cut exactly there.

A row for which none holds is rejected. BOS comes once, if this tokenizer uses it; EOS comes once,
supervised. `supervised` follows from positions alone: an id that equals PAD or EOS says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from torchprime.data.rows import Rejection, Row
from torchprime.data.tokenizer import Encoded, Tokenizer
from torchprime.errors import DataError

IGNORED = -100
# Tried in this order; all begin no longer token with what usually starts a completion.
NEUTRAL_CONTEXTS = ("\n", ".", ":", "a", "0")

REASON_BOUNDARY = "no exact token boundary between prompt and completion"
REASON_NO_TOKENS = "completion has no tokens"
REASON_UNPREDICTED = "empty prompt without BOS: nothing predicts the first token"
REASON_TOO_LONG = "longer than block_size"
REASON_NOTHING_LEFT = "no supervised token left after truncation"


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized row. `boundary` names the rule that found where the completion starts."""

    row_id: str
    ids: npt.NDArray[np.int32]
    supervised: npt.NDArray[np.bool_]
    boundary: str
    truncated: bool = False

    def targets(self) -> npt.NDArray[np.int32]:
        """What each position predicts: the next id if it is supervised, else IGNORED (law 4)."""
        targets = np.full(len(self.ids), IGNORED, dtype=np.int32)
        targets[:-1] = np.where(self.supervised[1:], self.ids[1:], IGNORED)
        return targets


@dataclass(frozen=True)
class _Parts:
    """A row's ids on both sides of the boundary, before BOS and EOS."""

    prompt: list[int]
    completion: list[int]
    boundary: str


def tokenize_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, compute_loss_on: str
) -> list[Example | Rejection]:
    """One result per row, in order. Give many rows at once: the tokenizer works in batches."""
    if compute_loss_on not in ("all", "completion"):
        raise DataError(
            f"dataset.compute_loss_on={compute_loss_on} is not known, expected all or completion"
        )
    if compute_loss_on == "completion" and any(row.kind == "text" for row in rows):
        raise DataError(
            "dataset.compute_loss_on=completion needs a prompt and a completion, but the rows are "
            "plain text. Set dataset.compute_loss_on=all"
        )
    return [
        _example(row, parts, tokenizer, compute_loss_on) if parts else _no_boundary(row)
        for row, parts in zip(rows, _split_at_boundary(rows, tokenizer), strict=True)
    ]


def _no_boundary(row: Row) -> Rejection:
    return Rejection(row.row_id, REASON_BOUNDARY, f"near {row.prompt[-8:] + row.completion[:8]!r}")


def _example(
    row: Row, parts: _Parts, tokenizer: Tokenizer, compute_loss_on: str
) -> Example | Rejection:
    if not parts.completion:
        return Rejection(row.row_id, REASON_NO_TOKENS)
    ids = tokenizer.with_bos(parts.prompt + parts.completion)
    if ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
    added_bos = len(tokenizer.with_bos(parts.prompt)) - len(parts.prompt)
    first = added_bos + len(parts.prompt) if row.kind != "text" else 1
    if first == 0:
        return Rejection(row.row_id, REASON_UNPREDICTED)
    supervised = np.ones(len(ids), dtype=np.bool_)
    supervised[: 1 if compute_loss_on == "all" else first] = False
    return Example(row.row_id, np.asarray(ids, dtype=np.int32), supervised, parts.boundary)


def _split_at_boundary(rows: Sequence[Row], tokenizer: Tokenizer) -> list[_Parts | None]:
    joint = tokenizer.encode_batch([row.prompt + row.completion for row in rows])
    prompts = tokenizer.encode_ids([row.prompt for row in rows])
    found: list[_Parts | None] = []
    for row, whole, prompt in zip(rows, joint, prompts, strict=True):
        cut = len(prompt)
        exact = whole.ids[:cut] == prompt and _cut_is_clean(whole, cut, len(row.prompt))
        found.append(_Parts(prompt, whole.ids[cut:], "joint") if exact else None)

    for context in ("", *NEUTRAL_CONTEXTS):
        open_rows = [i for i, parts in enumerate(found) if parts is None]
        if not open_rows:
            break
        completions = _completions_after(
            context, [rows[i].completion for i in open_rows], tokenizer
        )
        apart = [prompts[i] + (ids or []) for i, ids in zip(open_rows, completions, strict=True)]
        texts = tokenizer.decode_batch(apart, skip_special_tokens=False)
        wanted = tokenizer.decode_batch([joint[i].ids for i in open_rows], False)
        for i, ids, text, want in zip(open_rows, completions, texts, wanted, strict=True):
            if ids and text == want:
                found[i] = _Parts(prompts[i], ids, "context" if context else "separate")
    return found


def _cut_is_clean(encoded: Encoded, cut: int, boundary: int) -> bool:
    """No token stands for characters on both sides: one ends at the boundary, the next starts."""
    before_ends = cut == 0 or encoded.span(cut - 1)[1] <= boundary
    after_starts = cut == len(encoded.ids) or encoded.span(cut)[0] >= boundary
    return before_ends and after_starts


def _completions_after(
    context: str, completions: Sequence[str], tokenizer: Tokenizer
) -> list[list[int] | None]:
    """Each completion's ids when it follows `context`; None where a token takes in both."""
    results: list[list[int] | None] = []
    for encoded in tokenizer.encode_batch([context + completion for completion in completions]):
        starts = (i for i in range(len(encoded.ids)) if encoded.span(i)[0] >= len(context))
        cut = next(starts, len(encoded.ids))
        clean = _cut_is_clean(encoded, cut, len(context))
        results.append(encoded.ids[cut:] if clean else None)
    return results


def fit_to_block(example: Example, block_size: int, truncation: str) -> Example | Rejection:
    """The example as it is if it fits, else what the truncation setting says."""
    length = len(example.ids)
    if length <= block_size:
        return example
    if truncation == "drop":
        return Rejection(example.row_id, REASON_TOO_LONG, f"{length} tokens")
    if truncation == "error":
        raise DataError(
            f"{example.row_id}: the row has {length:,} tokens, dataset.block_size is "
            f"{block_size:,}. Raise dataset.block_size, or set dataset.truncation to drop or right"
        )
    if truncation != "right":
        raise DataError(
            f"dataset.truncation={truncation} is not known, expected drop, right or error"
        )
    supervised = example.supervised[:block_size]
    if not supervised.any():
        return Rejection(example.row_id, REASON_NOTHING_LEFT, f"{length} tokens")
    return replace(example, ids=example.ids[:block_size], supervised=supervised, truncated=True)
