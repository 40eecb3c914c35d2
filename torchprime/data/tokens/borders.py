"""Tokenization of texts so that labels begin and end exactly at given characters.

A model's input is the ids of the text before the answer, tokenized alone. Training has to use
exactly those ids, for each span that carries loss:

    joint     the whole text tokenized at once: no token crosses a border of a span, and the ids in
              front of every span are those of its prefix alone.
    separate  the text is split where joint fails, and its pieces are tokenized apart, if together
              they decode to the same text.
    context   the same, each piece tokenized after a character it does not merge with.

After a split the prefixes are compared again: a split before one span can change the ids before the
next one, and then no single sequence has the served ids for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torchprime.data.tokenizer.encoded import Encoded, JoinedEncoded
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.data.tokens.completions import NEUTRAL_CONTEXTS

REASON_TURN_BOUNDARY = "no exact token boundary at an assistant turn"
REASON_NOT_FED = "the ids in front of an assistant turn are not those that a server feeds"


class Bordered(NamedTuple):
    """A text and its spans [start, end) of characters that carry loss, in order."""

    text: str
    spans: Sequence[tuple[int, int]]


class Tokens(NamedTuple):
    """A text's tokens; `how` is the rule that made them."""

    encoded: Encoded
    how: str


class NotExact(NamedTuple):
    """The reason why there are no exact tokens."""

    reason: str
    detail: str


def tokenize_bordered(texts: Sequence[Bordered], tokenizer: Tokenizer) -> list[Tokens | NotExact]:
    """Tokenize each text, in order. Pass many at once: the tokenizer works in batches."""
    joint = tokenizer.encode_batch([each.text for each in texts])
    return [
        _apart(each, cuts, encoded.ids, tokenizer) if cuts else Tokens(encoded, "joint")
        for each, encoded, cuts in zip(texts, joint, _cuts(texts, joint, tokenizer), strict=True)
    ]


def _cuts(
    texts: Sequence[Bordered], joint: Sequence[Encoded], tokenizer: Tokenizer
) -> list[list[int]]:
    """Return for each text the borders at which its pieces have to be tokenized apart."""
    fed = are_fed(texts, joint, tokenizer)
    found = []
    for each, encoded, same in zip(texts, joint, fed, strict=True):
        crossed = {at for span in each.spans for at in span if encoded.cut(at) is None}
        starts = {start for (start, _), is_fed in zip(each.spans, same, strict=True) if not is_fed}
        found.append(sorted(crossed | starts))
    return found


def are_fed(
    texts: Sequence[Bordered], encoded: Sequence[Encoded], tokenizer: Tokenizer, cut: bool = False
) -> list[list[bool]]:
    """Compare the ids before each span with those of the same characters tokenized alone.

    In a text that was tokenized whole it is enough to compare the tokens between the last special
    token and the span, the same few characters in every row: the two sides of a special token are
    tokenized separately anyway. If those differ (or there is no such token, or the text was `cut`),
    the whole prefix is compared.
    """
    special = _special_ids(tokenizer)
    places = [(i, start) for i, each in enumerate(texts) for start, _ in each.spans]
    tails = [_tail(texts[i].text, encoded[i], start, special) for i, start in places]
    distinct = list({text for text, _ in tails})
    alone = dict(zip(distinct, tokenizer.encode_ids(distinct), strict=True))
    same = [not cut and alone[text] == ids for text, ids in tails]
    unsure = [k for k, equal in enumerate(same) if not equal]
    prefixes = [texts[places[k][0]].text[: places[k][1]] for k in unsure]
    for k, ids in zip(unsure, tokenizer.encode_ids(prefixes), strict=True):
        i, start = places[k]
        same[k] = encoded[i].ids[: encoded[i].before(start)] == ids
    results = iter(same)
    return [[next(results) for _ in each.spans] for each in texts]


def _special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    encoded = tokenizer.encode_ids(sorted(tokenizer.special_tokens))
    return frozenset(ids[0] for ids in encoded if len(ids) == 1)


def _tail(
    text: str, encoded: Encoded, start: int, special: frozenset[int]
) -> tuple[str, list[int]]:
    """Return text and ids from the last special token to a span's start."""
    end = encoded.before(start)
    first = end - 1
    while first > 0 and encoded.ids[first] not in special:
        first -= 1
    begin = encoded.span(first)[0] if first > 0 else 0
    return text[begin:start], encoded.ids[max(first, 0) : end]


def _apart(
    given: Bordered, cuts: list[int], joint: list[int], tokenizer: Tokenizer
) -> Tokens | NotExact:
    """Tokenize the pieces between the cuts separately, if the decoded text stays the same."""
    text = given.text
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    wanted = tokenizer.decode(joint, skip_special_tokens=False)
    for context in ("", *NEUTRAL_CONTEXTS):
        joined = _joined(pieces, cuts, context, tokenizer)
        if joined is None or tokenizer.decode(joined.ids, skip_special_tokens=False) != wanted:
            continue
        (fed,) = are_fed([given], [joined], tokenizer, cut=True)
        if not all(fed):
            start = given.spans[fed.index(False)][0]
            return NotExact(REASON_NOT_FED, f"near {_near(text, start)}")
        return Tokens(joined, "context" if context else "separate")
    return NotExact(REASON_TURN_BOUNDARY, f"near {_near(text, given.spans[0][0])}")


def _joined(
    pieces: Sequence[str], cuts: Sequence[int], context: str, tokenizer: Tokenizer
) -> JoinedEncoded | None:
    """Join the first piece's tokens and those of the others, tokenized after `context`.

    Return None if a token covers parts of both.
    """
    first, *others = tokenizer.encode_batch([pieces[0], *(context + p for p in pieces[1:])])
    ids, spans = list(first.ids), [first.span(i) for i in range(len(first.ids))]
    for cut, encoded in zip(cuts, others, strict=True):
        begin = encoded.cut(len(context))
        if begin is None:
            return None
        for i in range(begin, len(encoded.ids)):
            start, end = encoded.span(i)
            ids.append(encoded.ids[i])
            spans.append((start - len(context) + cut, end - len(context) + cut))
    return JoinedEncoded(ids, spans)


def _near(text: str, at: int) -> str:
    return repr(text[max(at - 8, 0) : at + 8])
