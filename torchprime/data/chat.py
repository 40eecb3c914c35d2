"""Conversations become examples: ids of the rendered text, labels by the turns' characters.

The whole text is tokenized once. A token belongs to a turn by the characters it stands for, so
every turn's border must also be a border between tokens, and the ids in front of a turn must be
those that a server feeds, which tokenizes the text up to there alone:

    joint     no token crosses a border, and the first supervised turn's prefix has the same ids
              when it is tokenized alone.
    separate  the text is cut at the borders that are crossed and its pieces are tokenized apart,
              if together they decode to the same text.
    context   the same, each piece tokenized after a character it does not merge with.

A conversation for which none holds is rejected, as is one that spells a special token in a
message (it would fake a turn's border). What the template renders is complete: no BOS is added,
and EOS only where the template ends the last turn without a stop token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from torchprime.data.encoded import Encoded, JoinedEncoded
from torchprime.data.records import Rejection
from torchprime.data.rendering import ChatTemplate, as_served
from torchprime.data.rows import Row
from torchprime.data.tokenize import (
    ALL,
    ASSISTANT,
    BOS,
    CONTEXT,
    NEUTRAL_CONTEXTS,
    OFF,
    REASON_UNSUPERVISED,
    STOP,
    Example,
    loss_mode,
)
from torchprime.data.tokenizer import Tokenizer
from torchprime.data.turns import Rendering, Span, reserved_texts, turn_spans

REASON_TURN_BOUNDARY = "no exact token boundary at an assistant turn"
REASON_SPECIAL = "message content spells a special token"
REASON_NO_STOP = "assistant turn without a stop token"
REASON_TWO_BOS = "the chat template writes BOS twice at the start"
REASON_NO_PROMPT = "no prompt in front of an assistant turn: nothing predicts its first token"


@dataclass(frozen=True)
class _Chat:
    """A row ready to be tokenized.

    Attributes:
        text: the rendering; it ends with the last turn where EOS is to follow that.
        weights: of each span, 0 for a turn that is not trained on.
        supervised: the spans with a weight.
        add_eos: EOS follows the text.
    """

    row: Row
    mode: str
    text: str
    spans: list[Span]
    weights: list[float]
    supervised: list[Span]
    add_eos: bool
    rule: str


@dataclass(frozen=True)
class _Tokens:
    """A text's tokens; `how` is the rule that made them."""

    encoded: Encoded
    how: str


def tokenize_chat(
    rows: Sequence[Row], tokenizer: Tokenizer, template: ChatTemplate, compute_loss_on: str
) -> list[Example | Rejection]:
    """One result per row of messages, in order. Give many rows at once: the tokenizer works in
    batches.

    Args:
        compute_loss_on: auto (assistant), assistant, last_assistant or all.
    """
    reserved = reserved_texts(template, tokenizer)
    spelled = _Spelled(reserved)
    results: list[Example | Rejection | _Chat] = [
        _render_row(row, template, reserved, spelled, loss_mode(compute_loss_on, row))
        for row in rows
    ]
    places = [i for i, result in enumerate(results) if isinstance(result, _Chat)]
    chats = [result for result in results if isinstance(result, _Chat)]
    for i, chat, tokens in zip(places, chats, _tokenize(chats, tokenizer), strict=True):
        results[i] = _example(chat, tokens, tokenizer) if tokens else _no_boundary(chat)
    return [result for result in results if not isinstance(result, _Chat)]


# A row's text and turns -------------------------------------------------------------------------


def _render_row(
    row: Row, template: ChatTemplate, reserved: frozenset[str], spelled: _Spelled, mode: str
) -> _Chat | Rejection:
    where = spelled.in_row(row)
    if where:
        return Rejection(row.row_id, REASON_SPECIAL, where)
    found = turn_spans(template, row, reserved, last_only=mode == "last_assistant")
    if isinstance(found, Rejection):
        return found
    weights = [row.weight * row.messages[span.message].weight for span in found.spans]
    if not any(weights) and (mode != "all" or row.weight == 0):
        return Rejection(row.row_id, REASON_UNSUPERVISED, _why_unsupervised(found, row))
    return _close(row, mode, found, weights)


def _why_unsupervised(found: Rendering, row: Row) -> str:
    if row.weight == 0:
        return "the row's weight is 0"
    return "every assistant turn has weight 0" if found.spans else "no assistant message"


def _close(row: Row, mode: str, found: Rendering, weights: list[float]) -> _Chat | Rejection:
    """See that every supervised turn ends with a stop token, EOS for the last one if need be."""
    text, add_eos = found.text, False
    for span, weight in zip(found.spans, weights, strict=True):
        if weight == 0 or span.stop < span.end:
            continue
        if span.message < len(row.messages) - 1 or text[span.end :].strip():
            return Rejection(row.row_id, REASON_NO_STOP, f"message {span.message}")
        text, add_eos = text[: span.end], True
    supervised = [span for span, weight in zip(found.spans, weights, strict=True) if weight > 0]
    if supervised and supervised[0].start == 0:
        return Rejection(row.row_id, REASON_NO_PROMPT, f"message {supervised[0].message}")
    return _Chat(row, mode, text, found.spans, weights, supervised, add_eos, found.rule)


class _Spelled:
    """Finds special tokens that some rows spell in a message or a tool."""

    def __init__(self, reserved: frozenset[str]) -> None:
        self._pattern = _any_of(reserved)
        # By identity, of rows that outlive this: conversations share their tools.
        self._in_tools: dict[int, str] = {}

    def in_row(self, row: Row) -> str:
        """Where, "" for nowhere."""
        if id(row.tools) not in self._in_tools:
            self._in_tools[id(row.tools)] = self._in_values("tool", row.tools)
        messages = as_served([message.template for message in row.messages])
        return self._in_values("message", messages) or self._in_tools[id(row.tools)]

    def _in_values(self, place: str, values: Sequence[Mapping[str, Any]]) -> str:
        if self._pattern is None:
            return ""
        for i, value in enumerate(values):
            for text in _texts(value):
                match = self._pattern.search(text)
                if match:
                    return f"{place} {i}: {match.group()}"
        return ""


@lru_cache(maxsize=16)
def _any_of(texts: frozenset[str]) -> re.Pattern[str] | None:
    longest_first = sorted(texts, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first))) if texts else None


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _texts(key)
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


# Tokens -----------------------------------------------------------------------------------------


def _tokenize(chats: Sequence[_Chat], tokenizer: Tokenizer) -> list[_Tokens | None]:
    joint = tokenizer.encode_batch([chat.text for chat in chats])
    found: list[_Tokens | None] = []
    for chat, encoded, fed in zip(chats, joint, _as_fed(chats, joint, tokenizer), strict=True):
        cuts = _crossed(chat, encoded, fed)
        apart = _apart(chat.text, cuts, encoded.ids, tokenizer) if cuts else None
        found.append(apart if cuts else _Tokens(encoded, "joint"))
    return found


def _crossed(chat: _Chat, encoded: Encoded, fed: bool) -> list[int]:
    """The borders of supervised turns that are not borders between tokens."""
    borders = sorted({place for span in chat.supervised for place in (span.start, span.end)})
    crossed = [place for place in borders if encoded.cut(place) is None]
    if borders and borders[0] not in crossed and not fed:
        crossed.insert(0, borders[0])
    return crossed


def _as_fed(chats: Sequence[_Chat], joint: Sequence[Encoded], tokenizer: Tokenizer) -> list[bool]:
    """Whether the ids in front of the first supervised turn are those of its prefix alone.

    Text on the two sides of a special token is tokenized apart anyway, so it is enough to look
    at what stands between the last one and the turn: the same few characters in every row. Where
    that differs (or there is no such token) the whole prefix is compared.
    """
    special = _special_ids(tokenizer)
    tails = [_tail(chat, encoded, special) for chat, encoded in zip(chats, joint, strict=True)]
    texts = list({text for text, _ in tails})
    alone = dict(zip(texts, tokenizer.encode_ids(texts), strict=True))
    fed = [alone[text] == ids for text, ids in tails]
    unsure = [i for i, same in enumerate(fed) if not same]
    starts = [chats[i].supervised[0].start for i in unsure]
    prefixes = tokenizer.encode_ids(
        [chats[i].text[:start] for i, start in zip(unsure, starts, strict=True)]
    )
    for i, prefix, start in zip(unsure, prefixes, starts, strict=True):
        fed[i] = joint[i].ids[: joint[i].before(start)] == prefix
    return fed


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    encoded = tokenizer.encode_ids(sorted(tokenizer.special_tokens))
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)


def _tail(chat: _Chat, encoded: Encoded, special: frozenset[int]) -> tuple[str, list[int]]:
    """Text and ids from the last special token to the first supervised turn."""
    if not chat.supervised:  # with compute_loss_on=all nothing is asked of a server
        return "", []
    start = chat.supervised[0].start
    end = encoded.before(start)
    first = end - 1
    while first > 0 and encoded.ids[first] not in special:
        first -= 1
    begin = encoded.span(first)[0] if first > 0 else 0
    return chat.text[begin:start], encoded.ids[max(first, 0) : end]


def _apart(text: str, cuts: list[int], joint: list[int], tokenizer: Tokenizer) -> _Tokens | None:
    """The pieces between the cuts tokenized apart, if that changes nothing of the text."""
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    wanted = tokenizer.decode(joint, skip_special_tokens=False)
    for context in ("", *NEUTRAL_CONTEXTS):
        first, *others = tokenizer.encode_batch([pieces[0], *(context + p for p in pieces[1:])])
        ids, spans = list(first.ids), [first.span(i) for i in range(len(first.ids))]
        begins = [encoded.cut(len(context)) for encoded in others]
        for cut, encoded, begin in zip(cuts, others, begins, strict=True):
            for i in range(begin or 0, len(encoded.ids)):
                start, end = encoded.span(i)
                ids.append(encoded.ids[i])
                spans.append((start - len(context) + cut, end - len(context) + cut))
        if None not in begins and tokenizer.decode(ids, skip_special_tokens=False) == wanted:
            return _Tokens(JoinedEncoded(ids, spans), "context" if context else "separate")
    return None


def _no_boundary(chat: _Chat) -> Rejection:
    at = chat.supervised[0].start
    near = chat.text[max(at - 8, 0) : at + 8]
    return Rejection(chat.row.row_id, REASON_TURN_BOUNDARY, f"near {near!r}")


# Labels -----------------------------------------------------------------------------------------


def _example(chat: _Chat, tokens: _Tokens, tokenizer: Tokenizer) -> Example | Rejection:
    encoded = tokens.encoded
    ids = np.asarray([*encoded.ids, *([tokenizer.eos_id] * chat.add_eos)], dtype=np.int32)
    bos = tokenizer.bos_id
    if bos is not None and len(ids) > 1 and ids[0] == ids[1] == bos:
        return Rejection(chat.row.row_id, REASON_TWO_BOS, repr(chat.text[:24]))
    weights = np.zeros(len(ids), dtype=np.float32)
    rules = np.full(len(ids), CONTEXT, dtype=np.uint8)
    if chat.mode == "all":
        weights[:], rules[:] = chat.row.weight, ALL
        if bos is not None and bos != tokenizer.eos_id:  # some formats begin each question with it
            weights[ids == bos], rules[ids == bos] = 0.0, BOS
    for span, weight in zip(chat.spans, chat.weights, strict=True):
        first, stop, end = map(encoded.before, (span.start, span.stop, span.end))
        if chat.add_eos and span is chat.spans[-1]:
            stop, end = len(ids) - 1, len(ids)
        weights[first:end] = weight
        rules[first:stop] = ASSISTANT if weight else OFF
        rules[stop:end] = STOP if weight else OFF
    weights[0] = 0.0
    rules[0] = BOS if ids[0] == bos else CONTEXT
    if not weights.any():
        return Rejection(chat.row.row_id, REASON_UNSUPERVISED, "the turns have no tokens")
    return Example(
        chat.row.row_id,
        ids,
        weights,
        rules,
        f"{chat.rule}, {tokens.how}",
        source=chat.row.source,
    )
