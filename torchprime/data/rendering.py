"""A chat template and the text it makes of messages.

Rendering is transformers', so a server renders the same. A template is jinja source and a program:
whatever goes wrong in it is a `TemplateRefusal`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import render_jinja_template

MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


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


@lru_cache
def _has_marks(text: str) -> bool:
    return MARK.search(COMMENT.sub("", text)) is not None


def render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
) -> str:
    """The text of a conversation; TemplateRefusal when the template raises."""
    return _render(template, messages, tools, add_generation_prompt)[0]


def render_with_marks(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, list[tuple[int, int]]]:
    """`render`, and the characters [start, end) of each {% generation %} block in it."""
    return _render(template, messages, tools, with_marks=True)


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


@lru_cache(maxsize=16)
def generation_prompt(template: ChatTemplate) -> str:
    """What asks for an answer after a user's message, "" where it cannot be told apart."""
    messages = [{"role": "user", "content": "a"}]
    try:
        plain, asking = render(template, messages), render(template, messages, (), True)
    except TemplateRefusal:
        return ""
    return asking[len(plain) :] if asking.startswith(plain) else ""
