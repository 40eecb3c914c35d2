"""The spans of a conversation's text that the assistant produces.

Labels need the characters that the model has to produce in an assistant turn: from the end of the
server's input (the generation prompt) to the end of the turn's stop token. `turn_spans` finds them
exactly or rejects the row:

      marks    {% generation %} in the template gives them. The families shipped here have the
      marks.
    derived  a turn starts where the rendering of the messages before it, with the generation
             prompt, ends, if the whole text begins with that. It ends at the first special token
             after its content; the content's end shows when every turn is rendered again with a
             word appended. A turn with tool calls ends where the rendering up to it does. Where no
             token closes a turn, the one that begins the next message ends it.

In both cases the text before every turn that carries loss is then compared with a server's input
for that turn: the messages before it, rendered with the generation prompt. If only the last turn is
trained and the template's text differs from that input (which may have an opened <think> that no
rendering has), the row's own answer is appended to the server's input.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torchprime.data.files.record import Rejection
from torchprime.data.rows.read import Row
from torchprime.data.templates.left_out import left_out, unsaid
from torchprime.data.templates.render import (
    ChatTemplate,
    TemplateRefusal,
    as_served,
    generation_prompt,
    render,
    render_with_marks,
)
from torchprime.data.templates.stop_tokens import SENTINEL, Stops, openers, stops_of
from torchprime.data.templates.structure import structure_of

REASON_REFUSED = "the chat template refuses the conversation"
REASON_MARKS = "generation marks and assistant turns differ in number"
REASON_NO_SPAN = "the assistant turn's span cannot be derived exactly"
REASON_LEFT_OUT = "the chat template leaves out what the assistant says"
REASON_NOT_SERVED = "the text in front of an assistant turn is not what a server feeds"
SHOWN_CHARACTERS = 48


@dataclass(frozen=True)
class Span:
    """Characters [start, end) that the model has to produce in one assistant turn.

    `stop` is the start of its stop token, or `end` if the template writes none.
    """

    message: int
    start: int
    end: int
    stop: int


@dataclass(frozen=True)
class Rendering:
    """A conversation's whole text, the spans of its assistant turns and the rule that found them.

    The rule is "marks", "derived" or "answer". `left_out` has NO_SYSTEM and similar notes.
    """

    text: str
    spans: list[Span]
    rule: str
    left_out: tuple[str, ...] = ()


def turn_spans(
    template: ChatTemplate,
    row: Row,
    stop_texts: frozenset[str],
    last_only: bool = False,
    served: bool = True,
) -> Rendering | Rejection:
    """Find a row's text and the span of each assistant turn, or of the last one only.

    Args:
        stop_texts: possible stop tokens, as `reserved_texts` returns them.
        served: compare the text before each turn that carries loss with a server's input for it.
    """
    template = template.for_tools(row.tools)
    messages = as_served([message.template for message in row.messages])
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    chat = _Conversation(template, messages, row.tools, stop_texts, turns)
    learned = {i for i in turns if row.messages[i].weight > 0} if served else set()
    try:
        found = _served_spans(chat, learned, last_only)
    except TemplateRefusal as refusal:
        return Rejection(row.row_id, REASON_REFUSED, str(refusal))
    except _NoSpan as problem:
        return Rejection(row.row_id, problem.reason, problem.detail)
    produced = {span.message: found.text[span.start : span.end] for span in found.spans}
    problem = unsaid(messages, produced)
    if problem:
        return Rejection(row.row_id, REASON_LEFT_OUT, problem)
    return replace(found, left_out=left_out(messages, row.tools, found.text))


def _served_spans(chat: _Conversation, learned: set[int], last_only: bool) -> Rendering:
    find = _marked_spans if chat.template.has_generation_marks else _derived_spans
    try:
        return _as_fed(chat, find(chat, last_only), learned)
    except _NoSpan as problem:
        if last_only and chat.turns and problem.reason in (REASON_NOT_SERVED, REASON_LEFT_OUT):
            return _answer_behind_prompt(chat, chat.turns[-1], problem)
        raise


class _NoSpan(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class _Conversation:
    template: ChatTemplate
    messages: list[Mapping[str, Any]]
    tools: tuple[Mapping[str, Any], ...]
    stop_texts: frozenset[str]
    turns: list[int]  # the indices of the assistant's messages

    @property
    def stops(self) -> Stops:
        return stops_of(self.stop_texts)

    def render(self, messages: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        return render(self.template, messages, self.tools, ask)

    def fed(self, turn: int) -> str:
        """Return a server's input text for this turn."""
        return self.render_up_to(turn, ask=True)

    def render_up_to(self, count: int, ask: bool = False) -> str:
        """Render the first messages alone; raise _NoSpan if the template refuses them."""
        try:
            return self.render(self.messages[:count], ask)
        except TemplateRefusal as refusal:
            raise _NoSpan(
                REASON_NO_SPAN, f"message {count + ask}: without what follows, {refusal}"
            ) from refusal

    def with_message(self, index: int, **changed: Any) -> list[Mapping[str, Any]]:
        messages = list(self.messages)
        messages[index] = {**messages[index], **changed}
        return messages

    def is_opener(self, text: str) -> bool:
        return text in openers(self.template, self.stop_texts)


def _marked_spans(chat: _Conversation, last_only: bool) -> Rendering:
    text, marks = render_with_marks(chat.template, chat.messages, chat.tools)
    if len(marks) != len(chat.turns):
        marks = _joined(marks)  # several marks in a row may make up one turn
    if len(marks) != len(chat.turns):
        raise _NoSpan(REASON_MARKS, f"{len(marks)} marks, {len(chat.turns)} assistant turns")
    pairs = list(zip(chat.turns, marks, strict=True))
    spans = [
        _marked_span(chat, text, turn, *mark) for turn, mark in pairs[-1 if last_only else 0 :]
    ]
    return _verified(text, spans, "marks")


def _joined(marks: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for start, end in marks:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def _marked_span(chat: _Conversation, text: str, turn: int, start: int, end: int) -> Span:
    """Return a mark's span without the server's input and without trailing white space."""
    prompt = generation_prompt(chat.template)
    if prompt and not text.endswith(prompt, 0, start):
        at = text.rfind(prompt, 0, min(end, start + len(prompt)))
        start = max(start, at + len(prompt) if at >= 0 else 0)
    inside = chat.stops.at_end(text[start:end])
    if inside:
        return Span(turn, start, start + inside[1], start + inside[0])
    stop, end = _stop_behind(chat, text, turn, end) or (end, end)
    return Span(turn, start, end, stop)


def _stop_behind(
    chat: _Conversation, text: str, turn: int, position: int
) -> tuple[int, int] | None:
    """Return the special token after a turn's content, if it does not begin the next message.

    A second token directly after it belongs to the turn if it is also there when nothing follows
    the turn.
    """
    found = chat.stops.after(text, position)
    if found is None or chat.is_opener(text[slice(*found)]):
        return None
    stop, end = found
    touching = chat.stops.after(text, end)
    while touching and touching[0] == end and not chat.is_opener(text[slice(*touching)]):
        if not chat.render_up_to(turn + 1).startswith(text[: touching[1]]):
            break
        end = touching[1]
        touching = chat.stops.after(text, end)
    return stop, end


def _role_token_behind(
    chat: _Conversation, text: str, turn: int, position: int
) -> tuple[int, int] | None:
    """Return the special token that begins the next message, where no token closes a turn.

    A model of such a format ends its answer with that token (GLM-4: <|user|>).
    """
    if turn + 1 == len(chat.messages) or turn + 1 in chat.turns:
        return None
    found = chat.stops.after(text, position)
    if found is None or found[0] != position or text[slice(*found)] == chat.template.bos_token:
        return None
    return found


def _derived_spans(chat: _Conversation, last_only: bool) -> Rendering:
    text = chat.render(chat.messages)
    contents = _content_ends(chat, text)
    spans: list[Span] = []
    for turn in chat.turns[-1 if last_only else 0 :]:
        prompt = chat.fed(turn)
        if not text.startswith(prompt):
            raise _not_served(turn, text, prompt)
        # A turn that calls tools ends after the calls, wherever its content is.
        if turn in contents:
            stop, end = _end_of_content(chat, text, turn, contents[turn])
        else:
            stop, end = _end_of_calls(chat, text, turn, len(prompt))
        spans.append(Span(turn, len(prompt), end, stop))
    return _verified(text, spans, "derived")


def _content_ends(chat: _Conversation, text: str) -> dict[int, int]:
    """Return the end of the content of each turn without tool calls.

    All these turns are rendered again with a word appended. The pieces between the words must make
    up the text; if the template trims content, they lack the white space at the content's end.
    """
    plain = [i for i in chat.turns if not chat.messages[i].get("tool_calls")]
    messages, words = list(chat.messages), [SENTINEL.format(i) for i in plain]
    for i, word in zip(plain, words, strict=True):
        messages[i] = {**messages[i], "content": (messages[i].get("content") or "") + word}
    try:
        rest = chat.render(messages)
    except TemplateRefusal:
        return {}
    pieces: list[str] = []
    for word in words:
        if rest.count(word) != 1 or word in text:
            return {}
        piece, _, rest = rest.partition(word)
        pieces.append(piece)
    trimmed = [
        _without_end(piece, _white_end(chat.messages[i].get("content") or ""))
        for i, piece in zip(plain, pieces, strict=True)
    ]
    for candidate in (pieces, trimmed):
        if "".join(candidate) + rest == text:
            ends, position = {}, 0
            for i, piece in zip(plain, candidate, strict=True):
                position += len(piece)
                ends[i] = position
            return ends
    return {}


def _white_end(content: str) -> str:
    """Return the white space after the content's last word, "" for content without words."""
    body = content.rstrip()
    return content[len(body) :] if body else ""


def _without_end(piece: str, end: str) -> str:
    return piece[: len(piece) - len(end)] if end and piece.endswith(end) else piece


def _end_of_content(chat: _Conversation, text: str, turn: int, content_end: int) -> tuple[int, int]:
    """Return start and end of the stop token after a turn's content."""
    behind = _stop_behind(chat, text, turn, content_end)
    if behind:
        return behind
    alone = text if turn == len(chat.messages) - 1 else chat.render_up_to(turn + 1)
    if text.startswith(alone) and len(alone) >= content_end:
        closing = chat.stops.at_end(alone[content_end:])
        if closing:
            return content_end + closing[0], content_end + closing[1]
        if not alone[content_end:].strip():
            return _role_token_behind(chat, text, turn, content_end) or (content_end, content_end)
    behind = text[content_end : content_end + 24]
    raise _NoSpan(
        REASON_NO_SPAN,
        f"message {turn + 1}: the end of the turn cannot be determined: its content is followed by "
        f"{behind!r}, which does not begin with a special token of this tokenizer",
    )


def _end_of_calls(chat: _Conversation, text: str, turn: int, start: int) -> tuple[int, int]:
    """Return start and end of the stop token after a turn's tool calls.

    The rendering up to this turn shows the closing text. If the whole text does not begin with that
    rendering (a template may treat the last message differently), the same closing text must follow
    the arguments of the last call, which are found by exchanging them.
    """
    failed = _NoSpan(
        REASON_NO_SPAN, f"message {turn + 1}: the end of the turn cannot be determined"
    )
    alone = chat.render_up_to(turn + 1)
    closing = chat.stops.at_end(alone)
    if closing is None or not chat.messages[turn].get("tool_calls"):
        raise failed
    if text.startswith(alone[: closing[1]]):
        return closing
    exchanged = chat.with_message(turn, tool_calls=_other_arguments(chat.messages[turn]))
    behind_alone = _common_end(alone, chat.render(exchanged[: turn + 1]))
    behind = _common_end(text, chat.render(exchanged))
    if closing[0] < behind_alone or behind in (0, len(text)):
        raise failed
    moved = behind - behind_alone
    if behind < start or not text.startswith(alone[behind_alone : closing[1]], behind):
        raise failed
    return closing[0] + moved, closing[1] + moved


def _other_arguments(message: Mapping[str, Any]) -> list[Any]:
    *others, last = message["tool_calls"]
    word = SENTINEL.format("")
    arguments = {"arguments": {word: word}}
    if isinstance(last.get("function"), Mapping):
        arguments = {"function": {**last["function"], **arguments}}
    return [*others, {**last, **arguments}]


def _common_end(text: str, other: str) -> int:
    """Return the start of the longest ending of `text` that `other` shares."""
    low, high = max(len(text) - len(other), 0), len(text)
    while low < high:
        middle = (low + high) // 2
        if other.endswith(text[middle:]):
            high = middle
        else:
            low = middle + 1
    return low


def _as_fed(chat: _Conversation, found: Rendering, learned: set[int]) -> Rendering:
    """Move the start of every turn that carries loss to the end of the server's input for it.

    Spans of derived turns begin there already.
    """
    if found.rule == "derived":
        return found
    structure = structure_of(chat.template.text, chat.messages, chat.tools)
    spans, before = [], 0
    for span in found.spans:
        # No request precedes an answer that begins the conversation.
        if span.message in learned and span.message > 0:
            key = structure and (chat.template, structure.before(span.message))
            moved = _moved.get(key)
            if moved is None:
                moved = _compare_with_fed(chat, found.text, span, before)
                if key is not None and len(_moved) < MOST_STRUCTURES:
                    _moved[key] = moved
            span = replace(span, start=span.start + moved)
        spans.append(span)
        before = span.end
    return replace(found, spans=spans)


# For each structure, the distance from a turn's mark to its start.
_moved: dict[Hashable, int] = {}
MOST_STRUCTURES = 50_000


def _compare_with_fed(chat: _Conversation, text: str, span: Span, before: int) -> int:
    """Return the distance from a turn's mark to the end of the server's input for it."""
    fed = chat.fed(span.message)
    if not text.startswith(fed) or not before <= len(fed) <= span.stop:
        raise _not_served(span.message, text[: span.start], fed)
    return len(fed) - span.start


def _not_served(turn: int, text: str, fed: str) -> _NoSpan:
    """Return both texts from shortly before their first difference."""
    pairs = zip(text, fed, strict=False)
    at = next((i for i, (mine, its) in enumerate(pairs) if mine != its), min(len(text), len(fed)))
    begin = max(at - 16, 0)
    mine, its = (each[begin : begin + SHOWN_CHARACTERS] for each in (text, fed))
    return _NoSpan(
        REASON_NOT_SERVED,
        f"message {turn + 1}: a server feeds {its!r}, the whole text has {mine!r}",
    )


def _answer_behind_prompt(chat: _Conversation, turn: int, problem: _NoSpan) -> Rendering:
    """Return the server's input for the last turn, followed by the row's answer.

    The template may open a think block in the generation prompt and write none in a finished turn,
    or remove the reasoning from a finished turn. A model continues the server's input, so the row's
    answer has to begin with the part of that input after the header.
    """
    content = chat.messages[turn].get("content") or ""
    if chat.messages[turn].get("tool_calls") or not content.strip():
        raise problem
    word = SENTINEL.format("")
    header, found, closing = chat.render(
        chat.with_message(turn, content=word)[: turn + 1]
    ).partition(word)
    fed = chat.fed(turn)
    stop = chat.stops.after(closing, 0)
    opened = fed[len(header) :]
    if not found or not fed.startswith(header) or not content.startswith(opened):
        raise problem
    text = fed + content[len(opened) :]
    start, end = (len(text), len(text)) if stop is None else (len(text) + s for s in stop)
    whole = text + closing[: 0 if stop is None else stop[1]]
    return Rendering(whole, [Span(turn, len(fed), end, start)], "answer")


def _verified(text: str, spans: list[Span], rule: str) -> Rendering:
    position = 0
    for span in spans:
        if not position <= span.start <= span.stop <= span.end <= len(text):
            raise _NoSpan(REASON_NO_SPAN, f"message {span.message + 1}: the turns are not in order")
        position = span.end
    return Rendering(text, spans, rule)
