"""Texts that hold prompt and answer together, separated by a marker (dataset.response_marker).

    ### Instruction:
    Add 2 and 3.
    ### Response:
    5

The text after the response marker carries loss, up to the next instruction marker if a text has
several turns. Markers are searched in characters: a tokenizer may write the same marker with other
ids in another place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchprime.config.sections.dataset import LossOn
from torchprime.data.files.record import Rejection
from torchprime.data.rows.read import Row
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.data.tokens.borders import Bordered, NotExact, Tokens, tokenize_bordered
from torchprime.data.tokens.completions import (
    BOS,
    COMPLETION,
    CONTEXT,
    REASON_UNSUPERVISED,
    STOP,
    Example,
    tokenize_rows,
)

REASON_NO_MARKER = "the text has no response marker"
REASON_MANY_MARKERS = "the text has more than one response marker"
REASON_NOTHING_BEHIND = "nothing follows the response marker"
REASON_NO_PROMPT = "nothing before the answer predicts its first token"


@dataclass(frozen=True)
class Markers:
    """Texts before an answer and, if a row has several turns, before an instruction."""

    response: str
    instruction: str | None = None


def tokenize_texts(
    rows: Sequence[Row], tokenizer: Tokenizer, compute_loss_on: LossOn, markers: Markers | None
) -> list[Example | Rejection]:
    """Return one result per row without messages, in order; markers divide plain texts."""
    if markers is None:
        return tokenize_rows(rows, tokenizer, compute_loss_on)
    marked = [row for row in rows if row.kind == "text"]
    others = [row for row in rows if row.kind != "text"]
    by_marker = iter(_tokenize_marked(marked, tokenizer, markers))
    by_rule = iter(tokenize_rows(others, tokenizer, compute_loss_on))
    return [next(by_marker if row.kind == "text" else by_rule) for row in rows]


def answer_spans(
    text: str, markers: Markers, row_id: str = ""
) -> list[tuple[int, int]] | Rejection:
    """Return the characters [start, end) after each response marker."""
    count = text.count(markers.response)
    if count == 0:
        return Rejection(row_id, REASON_NO_MARKER, f"it begins {text[:40]!r}")
    if count > 1 and markers.instruction is None:
        return Rejection(row_id, REASON_MANY_MARKERS, f"{count} of them")
    spans, at = [], 0
    while (found := text.find(markers.response, at)) >= 0:
        start = found + len(markers.response)
        end = -1 if markers.instruction is None else text.find(markers.instruction, start)
        at = len(text) if end < 0 else end
        spans.append((start, at))
    spans = [(start, end) for start, end in spans if text[start:end].strip()]
    return spans or Rejection(row_id, REASON_NOTHING_BEHIND)


def _tokenize_marked(
    rows: Sequence[Row], tokenizer: Tokenizer, markers: Markers
) -> list[Example | Rejection]:
    results: list[Example | Rejection | None] = []
    texts: list[Bordered] = []
    for row in rows:
        spans = answer_spans(row.completion, markers, row.row_id)
        if isinstance(spans, Rejection):
            results.append(spans)
            continue
        results.append(None)
        moved = len(row.prompt)
        whole = row.prompt + row.completion
        texts.append(Bordered(whole, [(moved + start, moved + end) for start, end in spans]))
    tokenized = zip(texts, tokenize_bordered(texts, tokenizer), strict=True)
    return [
        _example(row, *next(tokenized), tokenizer) if result is None else result
        for row, result in zip(rows, results, strict=True)
    ]


def _example(
    row: Row, text: Bordered, tokens: Tokens | NotExact, tokenizer: Tokenizer
) -> Example | Rejection:
    if isinstance(tokens, NotExact):
        return Rejection(row.row_id, tokens.reason, tokens.detail)
    if row.weight == 0:
        return Rejection(row.row_id, REASON_UNSUPERVISED, "the row's weight is 0")
    ids = tokenizer.with_bos(list(tokens.encoded.ids))
    added = len(ids) - len(tokens.encoded.ids)
    if ids[-1] != tokenizer.eos_id:
        ids.append(tokenizer.eos_id)
    weights = np.zeros(len(ids), dtype=np.float32)
    rules = np.full(len(ids), CONTEXT, dtype=np.uint8)
    for start, end in text.spans:
        first, behind = (added + tokens.encoded.before(at) for at in (start, end))
        if end == len(text.text):
            behind = len(ids)
        if first == 0:
            return Rejection(row.row_id, REASON_NO_PROMPT)
        weights[first:behind], rules[first:behind] = row.weight, COMPLETION
    if ids[0] == tokenizer.bos_id and tokenizer.add_bos:
        rules[0] = BOS
    if weights[-1] > 0:
        rules[-1] = STOP
    return Example(
        row.row_id,
        np.asarray(ids, dtype=np.int32),
        weights,
        rules,
        f"marker, {tokens.how}",
        source=row.source,
        row_weight=row.weight,
    )
