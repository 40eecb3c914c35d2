"""Examples from conversations: ids of the rendered text, labels by the turns' characters.

The whole text is tokenized once. A token belongs to a turn by the characters it covers, so every
turn's border must also be a border between tokens. The ids before a turn must equal a server's
input, which tokenizes the text up to there alone (borders.py).

A conversation that cannot satisfy this is rejected. So is one with a special token in the text of a
message, which would look like a turn's border. The rendered text is complete: no BOS is added, and
EOS only if the template ends the last turn without a stop token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from torchprime.config.sections.dataset import DatasetConfig, LossOn, Reasoning, SpecialTokensInText
from torchprime.data.files.record import Rejection
from torchprime.data.rows.limits import one_row
from torchprime.data.rows.read import Row
from torchprime.data.shared.notes import RowNotes
from torchprime.data.templates.reasoning import place_reasoning
from torchprime.data.templates.render import ChatTemplate
from torchprime.data.templates.stop_tokens import reserved_texts
from torchprime.data.templates.turns import Rendering, Span, turn_spans
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.data.tokens.borders import Bordered, NotExact, Tokens, tokenize_bordered
from torchprime.data.tokens.completions import (
    ALL,
    ASSISTANT,
    BOS,
    CONTEXT,
    OFF,
    REASON_UNSUPERVISED,
    STOP,
    Example,
    loss_mode,
)
from torchprime.data.tokens.spelled import ANSWERS, Spelled

REASON_SPECIAL = "message content spells a special token"
REASON_NO_STOP = "assistant turn without a stop token"
REASON_TWO_BOS = "the chat template writes BOS twice at the start"
REASON_NO_PROMPT = "no prompt in front of an assistant turn: nothing predicts its first token"
REASON_MASKED_PLACE = "train_detail: the content does not stand in the text as the row has it"


@dataclass(frozen=True)
class ChatRules:
    """The run's settings for conversations.

    Attributes:
        compute_loss_on: auto (assistant), assistant, last_assistant or all.
        reasoning: the policy for reasoning that the template never writes
            (data/templates/reasoning.py).
        special_tokens_in_text: `error`, or `answers` to allow special tokens in answers.
    """

    compute_loss_on: LossOn = DatasetConfig.compute_loss_on
    reasoning: Reasoning = DatasetConfig.reasoning
    special_tokens_in_text: SpecialTokensInText = DatasetConfig.special_tokens_in_text


@dataclass(frozen=True)
class _Chat:
    """A row ready to be tokenized.

    Attributes:
        text: the rendered text; it ends with the last turn if EOS has to follow that turn.
        weights: of each span, 0 for a turn that is not trained on.
        supervised: the spans with a weight.
        add_eos: EOS follows the text.
        masked: characters [start, end) of the text inside turns that carry no loss.
    """

    row: Row
    mode: LossOn
    text: str
    spans: list[Span]
    weights: list[float]
    supervised: list[Span]
    add_eos: bool
    rule: str
    masked: list[tuple[int, int]]


def tokenize_chat(
    rows: Sequence[Row],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    rules: ChatRules = ChatRules(),
    notes: RowNotes | None = None,
) -> list[Example | Rejection]:
    """Return one result per row of messages, in order.

    Pass many rows at once: the tokenizer works in batches.

    Args:
        notes: counts parts of used rows that the template leaves out.
    """
    renderer = _Renderer(template, tokenizer, rules)
    notes = RowNotes() if notes is None else notes
    results: list[Example | Rejection | _Chat] = []
    for row in rows:
        with one_row():
            results.append(renderer.chat(row, notes))
    places = [i for i, result in enumerate(results) if isinstance(result, _Chat)]
    chats = [result for result in results if isinstance(result, _Chat)]
    texts = [Bordered(c.text, [(span.start, span.end) for span in c.supervised]) for c in chats]
    tokenized = tokenize_bordered(texts, tokenizer)
    for i, chat, tokens in zip(places, chats, tokenized, strict=True):
        results[i] = _example(chat, tokens, tokenizer)
    return [result for result in results if not isinstance(result, _Chat)]


# A row's text and turns -------------------------------------------------------------------------


class _Renderer:
    """A renderer of rows' texts and turns with one template."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer, rules: ChatRules) -> None:
        self.template, self.rules = template, rules
        self.reserved = reserved_texts(template, tokenizer)
        in_answers = rules.special_tokens_in_text == ANSWERS
        self.spelled = Spelled(template, tokenizer, self.reserved, in_answers)

    def chat(self, row: Row, notes: RowNotes) -> _Chat | Rejection:
        mode = loss_mode(self.rules.compute_loss_on, row)
        where = self.spelled.in_row(row)
        if where:
            return Rejection(row.row_id, REASON_SPECIAL, where)
        placed = place_reasoning(row, self.template, self.rules.reasoning)
        if isinstance(placed, Rejection):
            return placed
        last_only, served = mode == "last_assistant", mode != "all"
        found = turn_spans(self.template, placed, self.reserved, last_only, served)
        if isinstance(found, Rejection):
            return found
        weights = [placed.weight * placed.messages[span.message].weight for span in found.spans]
        if not any(weights) and (mode != "all" or row.weight == 0):
            return Rejection(row.row_id, REASON_UNSUPERVISED, _why_unsupervised(found, row))
        for text in found.left_out:
            notes.notice(text, row.row_id)
        return _close(placed, mode, found, weights)


def _why_unsupervised(found: Rendering, row: Row) -> str:
    if row.weight == 0:
        return "the row's weight is 0"
    return "every assistant turn has weight 0" if found.spans else "no assistant message"


def _close(row: Row, mode: LossOn, found: Rendering, weights: list[float]) -> _Chat | Rejection:
    """Check that supervised turns end with a stop token; add EOS to the last if needed."""
    text, add_eos = found.text, False
    for span, weight in zip(found.spans, weights, strict=True):
        if weight == 0 or span.stop < span.end:
            continue
        if span.message < len(row.messages) - 1 or text[span.end :].strip():
            return Rejection(row.row_id, REASON_NO_STOP, f"message {span.message + 1}")
        text, add_eos = text[: span.end], True
    supervised = [span for span, weight in zip(found.spans, weights, strict=True) if weight > 0]
    if supervised and supervised[0].start == 0:
        return Rejection(row.row_id, REASON_NO_PROMPT, f"message {supervised[0].message + 1}")
    masked: list[tuple[int, int]] = []
    for span in supervised:
        ranges = row.messages[span.message].masked
        begin = text.find(row.messages[span.message].content, span.start, span.stop)
        if ranges and begin < 0:
            return Rejection(row.row_id, REASON_MASKED_PLACE, f"message {span.message + 1}")
        masked += [(begin + first, begin + end) for first, end in ranges]
    return _Chat(row, mode, text, found.spans, weights, supervised, add_eos, found.rule, masked)


# Labels -----------------------------------------------------------------------------------------


def _example(chat: _Chat, tokens: Tokens | NotExact, tokenizer: Tokenizer) -> Example | Rejection:
    if isinstance(tokens, NotExact):
        return Rejection(chat.row.row_id, tokens.reason, tokens.detail)
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
    for begin, behind in chat.masked:  # a token that covers a masked character carries no loss
        crossed = encoded.cut(behind) is None
        inside = slice(encoded.before(begin), encoded.before(behind) + crossed)
        weights[inside], rules[inside] = 0.0, OFF
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
        row_weight=chat.row.weight,
    )
