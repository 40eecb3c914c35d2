"""Examples from prompts and completions: ids, loss weights, and the rule behind each label.

    ids     = BOS? + prompt + completion + EOS
    weights = 0 for context, above 0 for what carries loss
    rules   = the reason for each label, for a person (`inspect`)

A model's input is exactly the ids of the prompt alone, so training must use exactly those ids.
Tokens tend to merge across the boundary between prompt and completion (and sentencepiece tends to
put a space before a completion tokenized alone), so the boundary is established, never guessed from
a length:

1. joint: the prompt's ids begin the ids of the whole text, and no token crosses the boundary.
2. separate: prompt and completion tokenized apart, if together they decode to the same text.
3. context: the completion tokenized after a character it does not merge with, cut exactly there.

A row for which none holds is rejected. BOS is added once, if this tokenizer uses it; EOS is added
once, supervised. Labels depend on positions alone, never on an id that equals PAD or EOS.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from torchprime.config.sections.dataset import LossOn, Truncation
from torchprime.data.files.record import Rejection
from torchprime.data.rows.read import Row
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.errors import DataError

IGNORED = -100
# Tried in this order; none begins a longer token with a usual start of a completion.
NEUTRAL_CONTEXTS = ("\n", ".", ":", "a", "0")

# The rules that set a token's label; an Example's `rules` are indices into this list. `off` is a
# turn that the row itself excludes.
RULES = ("context", "bos", "completion", "assistant", "stop", "all", "off")
CONTEXT, BOS, COMPLETION, ASSISTANT, STOP, ALL, OFF = range(len(RULES))

REASON_BOUNDARY = "no exact token boundary between prompt and completion"
REASON_NO_TOKENS = "completion has no tokens"
REASON_UNPREDICTED = "empty prompt without BOS: nothing predicts the first token"
REASON_TOO_LONG = "longer than block_size"
REASON_NOTHING_LEFT = "no supervised token left after truncation"
REASON_UNSUPERVISED = "no supervised token"


@dataclass(frozen=True, eq=False)
class Example:
    """One tokenized row; the arrays have one entry per token.

    Attributes:
        ids: int32.
        weights: fp32, the loss weight for predicting a token; 0 is context.
        rules: uint8, indices into RULES.
        boundary: the rule that found the start of supervision.
        source: the part of a mixture it is from.
        divisible: a text that may be split into blocks if it is longer than one.
        row_weight: the factor of the whole row in `weights`.
    """

    row_id: str
    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    rules: npt.NDArray[np.uint8]
    boundary: str
    source: str = ""
    truncated: bool = False
    divisible: bool = False
    row_weight: float = 1.0

    @property
    def supervised(self) -> npt.NDArray[np.bool_]:
        return self.weights > 0

    def targets(self) -> npt.NDArray[np.int32]:
        """Return each position's target: the next id if it is supervised, else IGNORED (law 4)."""
        targets = np.full(len(self.ids), IGNORED, dtype=np.int32)
        targets[:-1] = np.where(self.weights[1:] > 0, self.ids[1:], IGNORED)
        return targets


def averaged(example: Example) -> Example:
    """Return the example with token weights that sum up to its row's weight.

    The loss of every example then is its own mean over tokens, whatever its length. It is divided
    here, before packing: pieces, micro-batches and devices add up to the same sum. The first token
    is not predicted and does not count.
    """
    total = example.weights[1:].sum(dtype=np.float64)
    if total == 0:  # the row's weight is too small for fp32
        return example
    weights = example.weights.astype(np.float64) * (example.row_weight / total)
    return replace(example, weights=weights.astype(np.float32))


@dataclass(frozen=True)
class _Parts:
    """A row's ids on both sides of the boundary, before BOS and EOS."""

    prompt: list[int]
    completion: list[int]
    boundary: str


def loss_mode(requested: LossOn, row: Row) -> LossOn:
    """Return the mode for one row, with `auto` resolved; raise DataError if it does not apply."""
    if row.messages:
        if requested == "completion":
            raise DataError(
                "dataset.compute_loss_on=completion needs a prompt and a completion, but the rows "
                "are messages. Set dataset.compute_loss_on to assistant or last_assistant"
            )
        return "assistant" if requested == "auto" else requested
    if row.kind == "text":
        if requested not in ("auto", "all"):
            raise DataError(
                f"dataset.compute_loss_on={requested} needs a prompt and a completion, but the "
                "rows are plain text. Set dataset.compute_loss_on=all"
            )
        return "all"
    # A completion is the one assistant turn of its row.
    return "all" if requested == "all" else "completion"


def tokenize_rows(
    rows: Sequence[Row], tokenizer: Tokenizer, compute_loss_on: LossOn
) -> list[Example | Rejection]:
    """Return one result per row of text, in order.

    Pass many rows at once: the tokenizer works in batches.
    """
    modes: list[LossOn] = [loss_mode(compute_loss_on, row) for row in rows]
    found: list[_Parts | None] = []
    for row in rows:
        ids = tokenizer.joint_ids(row.prompt, row.completion)
        found.append(None if ids is None else _Parts(*ids, "joint"))
    unseen = [i for i, parts in enumerate(found) if parts is None]
    looked_at = _split_at_boundary([rows[i] for i in unseen], tokenizer)
    for i, parts in zip(unseen, looked_at, strict=True):
        found[i] = parts
    return [
        _example(row, parts, tokenizer, mode) if parts else _no_boundary(row)
        for row, parts, mode in zip(rows, found, modes, strict=True)
    ]


def _no_boundary(row: Row) -> Rejection:
    return Rejection(row.row_id, REASON_BOUNDARY, f"near {row.prompt[-8:] + row.completion[:8]!r}")


def _example(row: Row, parts: _Parts, tokenizer: Tokenizer, mode: LossOn) -> Example | Rejection:
    if not parts.completion:
        return Rejection(row.row_id, REASON_NO_TOKENS)
    ids = tokenizer.with_bos(parts.prompt + parts.completion)
    if ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
    added_bos = len(tokenizer.with_bos(parts.prompt)) - len(parts.prompt)
    first = added_bos + len(parts.prompt)
    if row.kind == "text":
        first = max(first, 1)  # the first token has no predecessor
    if first == 0:
        return Rejection(row.row_id, REASON_UNPREDICTED)
    if row.weight == 0:
        return Rejection(row.row_id, REASON_UNSUPERVISED, "the row's weight is 0")
    weights = np.full(len(ids), row.weight, dtype=np.float32)
    everything = mode == "all" and row.kind != "text"
    weights[: 1 if everything else first] = 0.0
    rules = np.full(len(ids), ALL if row.kind == "text" else COMPLETION, dtype=np.uint8)
    rules[:first] = ALL if everything else CONTEXT
    rules[0] = BOS if ids[0] == tokenizer.bos_id and tokenizer.add_bos else CONTEXT
    rules[-1] = STOP
    return Example(
        row.row_id,
        np.asarray(ids, dtype=np.int32),
        weights,
        rules,
        parts.boundary,
        source=row.source,
        divisible=row.kind == "text",
        row_weight=row.weight,
    )


def _split_at_boundary(rows: Sequence[Row], tokenizer: Tokenizer) -> list[_Parts | None]:
    joint = tokenizer.encode_batch([row.prompt + row.completion for row in rows])
    prompts = tokenizer.encode_ids([row.prompt for row in rows])
    found: list[_Parts | None] = []
    for row, whole, prompt in zip(rows, joint, prompts, strict=True):
        cut = len(prompt)
        exact = whole.ids[:cut] == prompt and whole.cut(len(row.prompt)) == cut
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


def _completions_after(
    context: str, completions: Sequence[str], tokenizer: Tokenizer
) -> list[list[int] | None]:
    """Return each completion's ids after `context`; None if a token covers parts of both."""
    encodings = tokenizer.encode_batch([context + completion for completion in completions])
    cuts = [encoded.cut(len(context)) for encoded in encodings]
    return [
        None if cut is None else encoded.ids[cut:]
        for encoded, cut in zip(encodings, cuts, strict=True)
    ]


def fit_to_block(example: Example, block_size: int, truncation: Truncation) -> Example | Rejection:
    """Return the example if it fits; otherwise apply the truncation setting.

    `split` leaves a divisible example (text) whole: the packing plan splits it into blocks.
    """
    length = len(example.ids)
    if length <= block_size or (truncation == "split" and example.divisible):
        return example
    if truncation in ("drop", "split"):
        return Rejection(example.row_id, REASON_TOO_LONG, f"{length} tokens")
    if truncation == "error":
        raise DataError(
            f"{example.row_id}: the row has {length:,} tokens, dataset.block_size is "
            f"{block_size:,}. Raise dataset.block_size, or set dataset.truncation to drop, left, "
            "right or split"
        )
    kept = np.arange(block_size)
    if truncation == "left":
        kept = np.arange(length - block_size, length)
        if example.rules[0] == BOS:
            kept[0] = 0  # a text begins with BOS, even if the text after it was truncated
    weights = example.weights[kept]
    if not (weights[1:] > 0).any():  # no token predicts the first one
        return Rejection(example.row_id, REASON_NOTHING_LEFT, f"{length} tokens")
    return replace(
        example,
        ids=example.ids[kept],
        weights=weights,
        rules=example.rules[kept],
        truncated=True,
    )
