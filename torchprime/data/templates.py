"""Chat templates: which one a run uses, what it renders, and where in it the model speaks.

A template is jinja source that turns messages into one text. It comes from the tokenizer's own
folder, from a family shipped in assets/templates, or from a user's file; what trains is what is
exported. Rendering is transformers', so a server renders the same.

Labels need to know which characters of the text an assistant turn has to produce: from just after
what a server feeds (the generation prompt) to the end of its stop token. `turn_spans` finds that
exactly or rejects the row:

    marks    {% generation %} in the template says it. The families shipped here have the marks.
    derived  a turn starts where the rendering of the messages before it, with the generation
             prompt, ends, if the whole text begins with that. It ends at the first special token
             after its content; the content's end shows when every turn is rendered again with a
             word appended. A turn with tool calls ends where the rendering up to it does.

A template that drops the reasoning of earlier turns or adds an empty think block does so in
training as it does when serving: what `reasoning_policy` says is shown by `inspect`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

from torchprime.data.records import Rejection
from torchprime.data.rows import Message, Row
from torchprime.data.tokenizer import Tokenizer, _read_json, _settings, _token
from torchprime.errors import DataError

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "templates"
OWN = "tokenizer's own"
FILE_ENDINGS = (".jinja", ".jinja2")

# A family and the control tokens that its format consists of, which a tokenizer made for it has
# as one token each. Families without any are written in plain words.
FAMILIES: dict[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": (),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "mistral": ("[INST]", "[/INST]"),
    "qwen2.5": ("<|im_start|>", "<|im_end|>"),
    "qwen3": ("<|im_start|>", "<|im_end|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
    "zephyr": (),
    "alpaca": (),
    "vicuna": (),
}

REASON_REFUSED = "the chat template refuses the conversation"
REASON_MARKS = "generation marks and assistant turns differ in number"
REASON_NO_SPAN = "the assistant turn's span cannot be derived exactly"
REASON_LEFT_OUT = "the chat template leaves out what the assistant says"

MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
BOS_USED = re.compile(r"\bbos_token\b")
SENTINEL = "zqSentinel{}Qz"


class TemplateRefusal(Exception):
    """The template raised while it rendered a conversation; the text says why."""


@dataclass(frozen=True)
class ChatTemplate:
    """A template with what it takes from the tokenizer.

    Attributes:
        name: "tokenizer's own", a family or a file's name.
        text: jinja source, the one that is exported.
        bos_token, eos_token: their texts, "" where the tokenizer has none.
        markers: a family's control tokens.
        warnings: what a person should know before training with it.
    """

    name: str
    text: str
    bos_token: str = ""
    eos_token: str = ""
    markers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def has_generation_marks(self) -> bool:
        return _has_marks(self.text)

    def fingerprint(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


@dataclass(frozen=True)
class Span:
    """Characters [start, end) that the model has to produce in one assistant turn.

    `stop` is where its stop token begins; the same as `end` when the template writes none.
    """

    message: int
    start: int
    end: int
    stop: int


@dataclass(frozen=True)
class Rendering:
    """A conversation's whole text, the spans of its assistant turns and the rule that found
    them, "marks" or "derived"."""

    text: str
    spans: list[Span]
    rule: str


@lru_cache
def _has_marks(text: str) -> bool:
    return MARK.search(COMMENT.sub("", text)) is not None


# Which template ---------------------------------------------------------------------------------


def resolve_template(chosen: str | None, tokenizer: Tokenizer) -> ChatTemplate | None:
    """The template that dataset.chat_template names, or the tokenizer's own.

    None when nothing is chosen and the tokenizer has none. A name that is neither a family nor a
    file, a file that cannot be read and a template that is not jinja are DataErrors.
    """
    settings = _settings(tokenizer.folder)
    bos = _token(settings, "bos_token") or ""
    warnings: list[str] = []
    if not bos and tokenizer.add_bos and tokenizer.bos_id is not None:
        bos = tokenizer.token_text(tokenizer.bos_id) or ""
        warnings.append(
            f"tokenizer.json begins texts with {bos!r} but tokenizer_config.json names no "
            "bos_token: add it, or a server renders conversations without it"
        )
    eos = tokenizer.token_text(tokenizer.eos_id) or ""

    if chosen in (None, "auto", "default"):
        text = _own_text(tokenizer.folder, settings)
        if text is None:
            return None
        template = ChatTemplate(OWN, text, bos, eos)
    elif chosen.endswith(FILE_ENDINGS):
        template = ChatTemplate(Path(chosen).name, _file_text(Path(chosen)), bos, eos)
    elif chosen in FAMILIES:
        template = ChatTemplate(
            chosen, _family_text(chosen, tokenizer), bos, eos, markers=FAMILIES[chosen]
        )
    else:
        raise DataError(_unknown_template(chosen))
    _check_syntax(template)
    return replace(template, warnings=(*warnings, *_warnings(template, tokenizer)))


def _own_text(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """What transformers would serve: the file of its own goes before tokenizer_config.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return _read_text(path)
    for name, found in (
        ("tokenizer_config.json", settings.get("chat_template")),
        ("chat_template.json", _read_json(folder / "chat_template.json").get("chat_template")),
    ):
        if isinstance(found, str):
            return found
        if found is not None:
            return _default_of(found, folder / name)
    return None


def _default_of(found: object, path: Path) -> str:
    """Several templates in one file: the one named default."""
    named = {
        item.get("name"): item.get("template")
        for item in (found if isinstance(found, list) else [])
        if isinstance(item, dict)
    }
    text = named.get("default")
    if isinstance(text, str):
        return text
    raise DataError(
        f"chat_template in {path} has no template named default (found "
        f"{', '.join(map(str, named)) or type(found).__name__}). Save the one to train with as a "
        "file and set dataset.chat_template to its path"
    )


def _file_text(path: Path) -> str:
    if path.is_file():
        return _read_text(path)
    folder = path.parent
    others = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, others, n=3) or [
        name for name in sorted(others) if name.endswith(FILE_ENDINGS)
    ]
    hint = f"; the folder has {', '.join(near[:5])}" if near else ""
    raise DataError(f"dataset.chat_template={path}: there is no such file{hint}")


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the chat template {path} cannot be read: {error}") from error


def _family_text(family: str, tokenizer: Tokenizer) -> str:
    """The shipped source; a tokenizer that wants BOS gets it written by the template itself.

    Servers encode what a template renders without adding anything to it.
    """
    text = (FOLDER / f"{family}.jinja").read_text(encoding="utf-8")
    if tokenizer.add_bos and not BOS_USED.search(text):
        return "{{- bos_token }}\n" + text
    return text


def _unknown_template(chosen: str) -> str:
    near = difflib.get_close_matches(chosen.lower(), FAMILIES, n=1)
    return (
        f"dataset.chat_template={chosen} is not known"
        f"{f'; did you mean {near[0]}?' if near else ''}. Expected {', '.join(FAMILIES)}, a path "
        f"that ends in {' or '.join(FILE_ENDINGS)}, or null for the tokenizer's own"
    )


def _check_syntax(template: ChatTemplate) -> None:
    try:
        render(template, [{"role": "user", "content": "a"}])
    except TemplateRefusal as refusal:
        cause = refusal.__cause__
        if isinstance(cause, jinja2.TemplateSyntaxError):
            raise DataError(
                f"the chat template ({template.name}) is not valid jinja: {cause.message} at line "
                f"{cause.lineno}"
            ) from cause


def _warnings(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    found: list[str] = []
    special = tokenizer.special_tokens
    plain = [marker for marker in template.markers if marker not in special]
    if plain:
        found.append(
            f"{', '.join(plain)} of the {template.name} template are not special tokens of this "
            "tokenizer: they are learned as plain text of several tokens each"
        )
    if tokenizer.encode_ids([template.eos_token])[0] != [tokenizer.eos_id]:
        found.append(
            f"the text of eos_token, {template.eos_token!r}, is not one token for this tokenizer: "
            "a template that writes it does not write EOS"
        )
    found += _warnings_of_rendering(template, tokenizer)
    if "strftime_now" in template.text:
        found.append("the template writes today's date: prepared data depends on the day")
    return found


def _warnings_of_rendering(template: ChatTemplate, tokenizer: Tokenizer) -> list[str]:
    """How a short conversation begins and ends, where the template renders one."""
    messages = ({"role": "user", "content": "a"}, {"role": "assistant", "content": "b"})
    row = Row("", "messages", messages=tuple(map(Message, messages)))
    probe = turn_spans(template, row, reserved_texts(template, tokenizer))
    if isinstance(probe, Rejection):
        return []
    found: list[str] = []
    if tokenizer.add_bos and not probe.text.startswith(template.bos_token):
        found.append(
            f"the tokenizer begins texts with {template.bos_token!r}, the template does not: "
            "conversations have no BOS, in training as when served"
        )
    stop = probe.text[probe.spans[-1].stop : probe.spans[-1].end]
    ends = {template.eos_token, *map(tokenizer.token_text, tokenizer.generation_eos_ids)}
    if stop and stop not in ends:
        found.append(
            f"turns end with {stop!r}, which is neither eos_token ({template.eos_token!r}) nor in "
            "generation_config.json: a server stops there only if told to"
        )
    return found


def reserved_texts(template: ChatTemplate, tokenizer: Tokenizer) -> frozenset[str]:
    """What only the template may write: special tokens, also a family's that are plain here."""
    own = {template.bos_token, template.eos_token, *template.markers} - {""}
    return tokenizer.special_tokens | own


# Rendering --------------------------------------------------------------------------------------


def render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation; TemplateRefusal when the template raises."""
    return _render(template, messages, tools, add_generation_prompt)[0]


def _render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
    with_marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    # As for transformers a token that the tokenizer lacks is undefined in the template.
    tokens = {"bos_token": template.bos_token, "eos_token": template.eos_token}
    defined: dict[str, Any] = {name: text for name, text in tokens.items() if text}
    try:
        # It keeps compiled templates; its own work is a tenth of the time.
        result: Any = render_jinja_template(
            [[dict(message) for message in as_served(messages)]],
            tools=[dict(tool) for tool in tools] or None,
            chat_template=template.text,
            add_generation_prompt=add_generation_prompt,
            return_assistant_tokens_mask=with_marks,
            **defined,
        )
    except jinja2.TemplateError as error:
        raise TemplateRefusal(str(error)) from error
    except Exception as error:  # a template is a program: it can fail in any way
        raise TemplateRefusal(f"{type(error).__name__}: {error}") from error
    texts, marks = result
    return texts[0], marks[0] if with_marks else []


def as_served(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Messages with tool calls as vLLM gives them to a template.

    Arguments are objects where rows have them as JSON text (the API writes text, templates are
    written for objects), and content that is null is "" (some templates would write "None").
    """
    return [_as_served(message) if message.get("tool_calls") else message for message in messages]


def _as_served(message: Mapping[str, Any]) -> Mapping[str, Any]:
    calls = [_call_as_served(call) for call in message["tool_calls"]]
    return {**message, "content": message.get("content") or "", "tool_calls": calls}


def _call_as_served(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _call_as_served(call["function"])}
    arguments = call.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        parsed = json.loads(arguments)
    except (ValueError, RecursionError):
        return call
    return {**call, "arguments": parsed} if isinstance(parsed, dict) else call


# Special tokens in a text -----------------------------------------------------------------------


class _Stops:
    """Finds special tokens where a turn could end."""

    def __init__(self, texts: frozenset[str]) -> None:
        self.texts = tuple(sorted(texts, key=len, reverse=True))
        self._pattern = re.compile(r"\s*(" + "|".join(map(re.escape, self.texts)) + ")")

    def after(self, text: str, position: int) -> tuple[int, int] | None:
        """Where the special token at this position stands, white space in front allowed."""
        match = self._pattern.match(text, position) if self.texts else None
        return match.span(1) if match else None

    def at_end(self, text: str) -> tuple[int, int] | None:
        """Where the special token at the end of a text stands, white space behind allowed."""
        body = text.rstrip()
        if not body.endswith(self.texts):
            return None
        longest = next(stop for stop in self.texts if body.endswith(stop))
        return len(body) - len(longest), len(body)


@lru_cache(maxsize=16)
def _stops(texts: frozenset[str]) -> _Stops:
    return _Stops(texts)


@lru_cache(maxsize=16)
def _openers(template: ChatTemplate, texts: frozenset[str]) -> frozenset[str]:
    """Special tokens that begin a message: found after an answer, they do not end it.

    Those in front of a user's text or in the generation prompt, except what also closes that
    text and except EOS (which some tokenizers use as BOS too).
    """
    word = SENTINEL.format("")
    try:
        before, _, after = render(template, [{"role": "user", "content": word}]).partition(word)
    except TemplateRefusal:
        return frozenset()
    opening = before + generation_prompt(template)
    return frozenset(
        text for text in texts if text in opening and text not in after + template.eos_token
    )


@lru_cache(maxsize=16)
def generation_prompt(template: ChatTemplate) -> str:
    """What asks for an answer after a user's message, "" where it cannot be told apart."""
    messages = [{"role": "user", "content": "a"}]
    try:
        plain, asking = render(template, messages), render(template, messages, (), True)
    except TemplateRefusal:
        return ""
    return asking[len(plain) :] if asking.startswith(plain) else ""


# Spans ------------------------------------------------------------------------------------------


def turn_spans(
    template: ChatTemplate, row: Row, stop_texts: frozenset[str], last_only: bool = False
) -> Rendering | Rejection:
    """A row's text and the span of each assistant turn, or of the last one alone.

    Args:
        stop_texts: what can be a stop token, see `reserved_texts`.
    """
    messages = as_served([message.template for message in row.messages])
    turns = [i for i, message in enumerate(messages) if message.get("role") == "assistant"]
    find = _marked_spans if template.has_generation_marks else _derived_spans
    try:
        found = find(_Conversation(template, messages, row.tools, stop_texts, turns), last_only)
    except TemplateRefusal as refusal:
        return Rejection(row.row_id, REASON_REFUSED, str(refusal))
    except _NoSpan as problem:
        return Rejection(row.row_id, problem.reason, problem.detail)
    problem = _left_out(found, messages)
    return Rejection(row.row_id, REASON_LEFT_OUT, problem) if problem else found


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
    turns: list[int]  # which messages are the assistant's

    @property
    def stops(self) -> _Stops:
        return _stops(self.stop_texts)

    def render(self, messages: Sequence[Mapping[str, Any]], ask: bool = False) -> str:
        return render(self.template, messages, self.tools, ask)

    def render_up_to(self, count: int, ask: bool = False) -> str:
        """The first messages alone; a template that refuses them gives nothing to go by."""
        try:
            return self.render(self.messages[:count], ask)
        except TemplateRefusal as refusal:
            raise _NoSpan(
                REASON_NO_SPAN, f"message {count - 1 + ask}: without what follows, {refusal}"
            ) from refusal

    def with_message(self, index: int, **changed: Any) -> list[Mapping[str, Any]]:
        messages = list(self.messages)
        messages[index] = {**messages[index], **changed}
        return messages

    def is_opener(self, text: str) -> bool:
        return text in _openers(self.template, self.stop_texts)


def _marked_spans(chat: _Conversation, last_only: bool) -> Rendering:
    text, marks = _render(chat.template, chat.messages, chat.tools, with_marks=True)
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
    """A mark, without what the server feeds and without white space behind the stop token."""
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
    """The special token behind a turn's content, if it does not begin the next message.

    A second one that touches it belongs to the turn if it also stands there when nothing follows
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


def _derived_spans(chat: _Conversation, last_only: bool) -> Rendering:
    text = chat.render(chat.messages)
    contents = _content_ends(chat, text)
    spans: list[Span] = []
    for turn in chat.turns[-1 if last_only else 0 :]:
        prompt = chat.render_up_to(turn, ask=True)
        if not text.startswith(prompt):
            raise _NoSpan(
                REASON_NO_SPAN,
                f"message {turn}: the text does not begin with what a server would feed for it",
            )
        # A turn that calls tools ends behind the calls, wherever its content is.
        if turn in contents:
            stop, end = _end_of_content(chat, text, turn, contents[turn])
        else:
            stop, end = _end_of_calls(chat, text, turn, len(prompt))
        spans.append(Span(turn, len(prompt), end, stop))
    return _verified(text, spans, "derived")


def _content_ends(chat: _Conversation, text: str) -> dict[int, int]:
    """Where the content of each turn without tool calls ends in the text.

    All of them are rendered again with a word appended. The pieces between the words must make up
    the text; where the template trims content, without the white space the content ends with.
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
    """The white space behind the content's last word, "" for content without words."""
    body = content.rstrip()
    return content[len(body) :] if body else ""


def _without_end(piece: str, end: str) -> str:
    return piece[: len(piece) - len(end)] if end and piece.endswith(end) else piece


def _end_of_content(chat: _Conversation, text: str, turn: int, content_end: int) -> tuple[int, int]:
    """Where the stop token behind a turn's content begins and ends."""
    behind = _stop_behind(chat, text, turn, content_end)
    if behind:
        return behind
    alone = text if turn == len(chat.messages) - 1 else chat.render_up_to(turn + 1)
    if text.startswith(alone) and len(alone) >= content_end:
        closing = chat.stops.at_end(alone[content_end:])
        if closing:
            return content_end + closing[0], content_end + closing[1]
        if not alone[content_end:].strip():
            return content_end, content_end
    raise _NoSpan(REASON_NO_SPAN, f"message {turn}: what ends the turn cannot be told")


def _end_of_calls(chat: _Conversation, text: str, turn: int, start: int) -> tuple[int, int]:
    """Where the stop token behind a turn's tool calls begins and ends.

    The rendering up to this turn shows with what it closes. If the whole text does not begin with
    that rendering (a template may treat the last message in its own way), the same closing must
    stand behind the arguments of the last call, whose place shows when they are exchanged.
    """
    failed = _NoSpan(REASON_NO_SPAN, f"message {turn}: what ends the turn cannot be told")
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
    """Where the part of `text` begins that `other` ends with too."""
    low, high = max(len(text) - len(other), 0), len(text)
    while low < high:
        middle = (low + high) // 2
        if other.endswith(text[middle:]):
            high = middle
        else:
            low = middle + 1
    return low


def _verified(text: str, spans: list[Span], rule: str) -> Rendering:
    position = 0
    for span in spans:
        if not position <= span.start <= span.stop <= span.end <= len(text):
            raise _NoSpan(REASON_NO_SPAN, f"message {span.message}: the turns are not in order")
        position = span.end
    return Rendering(text, spans, rule)


def _left_out(found: Rendering, messages: Sequence[Mapping[str, Any]]) -> str:
    """What of an assistant's words or calls its span does not show; reasoning may go missing."""
    for span in found.spans:
        message, shown = messages[span.message], found.text[span.start : span.end]
        content = message.get("content")
        if isinstance(content, str) and content.rpartition("</think>")[2].strip() not in shown:
            return f"message {span.message}: its content"
        for call in message.get("tool_calls") or ():
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            if str(function.get("name", "")) not in shown:
                return f"message {span.message}: the call of {function.get('name')}"
    return ""


# Reasoning --------------------------------------------------------------------------------------


def reasoning_policy(template: ChatTemplate) -> str:
    """What this template does with think blocks, found out on a conversation of two turns."""
    field = _fate(template, lambda i: {"reasoning_content": f"why{i}", "content": f"say{i}"})
    inline = _fate(template, lambda i: {"content": f"<think>\nwhy{i}\n</think>\n\nsay{i}"})
    if field is None or inline is None:
        return "The template refuses a probe of two turns: what it does with reasoning is unknown."
    if field == inline:
        first = f"Reasoning (as reasoning_content or in <think> in the content) is {field}"
    else:
        first = (
            f"Reasoning as reasoning_content is {field}; in <think> in the content it is {inline}"
        )
    return f"{first}. {_added(template)}."


def _probe(answer: Callable[[int], dict[str, str]]) -> list[dict[str, str]]:
    return [
        message
        for i in (1, 2)
        for message in ({"role": "user", "content": f"ask{i}"}, {"role": "assistant", **answer(i)})
    ]


def _fate(template: ChatTemplate, answer: Callable[[int], dict[str, str]]) -> str | None:
    try:
        text = render(template, _probe(answer))
    except TemplateRefusal:
        return None
    kept = ("why1" in text, "why2" in text)
    return {
        (True, True): "kept in every turn",
        (False, True): "kept in the last turn and dropped from earlier ones",
        (True, False): "dropped from the last turn and kept in earlier ones",
        (False, False): "dropped",
    }[kept]


def _added(template: ChatTemplate) -> str:
    """Think blocks that the template writes where a row has no reasoning."""
    text = render(template, _probe(lambda i: {"content": f"say{i}"}))
    first, _, rest = text.partition("say1")
    added = ["earlier turns"] if "<think>" in first else []
    added += ["the last turn"] if "<think>" in rest.partition("say2")[0] else []
    where = (
        f"gets an empty think block in {' and '.join(added)}" if added else "gets no think block"
    )
    asked = generation_prompt(template)
    opened = "; the generation prompt opens one" if "<think>" in asked else ""
    return f"A conversation without reasoning {where}{opened}"
