"""A chat template, and the rendering of messages to text.

transformers renders, so a server renders the same. A template is jinja source and a program: any
error in it is a `TemplateRefusal`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import lru_cache, wraps
from typing import Any

import jinja2
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    render_jinja_template,
)

from torchprime.data.rows.limits import TooSlow, bounded, rendering

MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
UNDEFINED = "undefined in the template"
COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)


class TemplateRefusal(Exception):
    """The template raised while it rendered a conversation; the text has the reason."""


TOOL_USE = "tool_use"
DATE_FUNCTION = "strftime_now"


@dataclass(frozen=True)
class ChatTemplate:
    """A template with its inputs from the tokenizer and from the run.

    Attributes:
        name: "tokenizer's own", a family or a file's name.
        text: jinja source, the one that is exported as the default.
        bos_token, eos_token: their texts, "" if the tokenizer has none.
        markers: a family's control tokens.
        warnings: facts that a person should know before training with it.
        named: (name, jinja source) of the tokenizer's other templates. As in transformers and vLLM
            the one named `tool_use` renders every conversation with tools.
        options: (variable, JSON text) of the template's other variables: enable_thinking, ...
        date: ISO date for `strftime_now`; "" if no template uses it.
    """

    name: str
    text: str
    bos_token: str = ""
    eos_token: str = ""
    markers: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    named: tuple[tuple[str, str], ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    date: str = ""

    @property
    def has_generation_marks(self) -> bool:
        return _has_marks(self.text)

    @property
    def texts(self) -> dict[str, str]:
        """Every template by name, in exported form."""
        return {"default": self.text, **dict(self.named)}

    @property
    def option_values(self) -> dict[str, Any]:
        """The options as a server receives them."""
        return {name: json.loads(value) for name, value in self.options}

    def for_tools(self, tools: Sequence[Mapping[str, Any]]) -> ChatTemplate:
        """Return the template that renders a conversation with these tools, as the only one."""
        return _alone(self, bool(tools)) if self.named else self

    def fingerprint(self) -> str:
        """Return a sha256 of everything that a rendering depends on besides the messages."""
        if not (self.named or self.options or self.date):
            return text_hash(self.text)
        parts = [self.text, self.named, self.options, self.date]
        return text_hash(json.dumps(parts))


def text_hash(text: str) -> str:
    """Return the sha256 of a template's source."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


@lru_cache(maxsize=16)
def _alone(template: ChatTemplate, with_tools: bool) -> ChatTemplate:
    text = dict(template.named).get(TOOL_USE) if with_tools else None
    return replace(template, text=text or template.text, named=())


@lru_cache
def _has_marks(text: str) -> bool:
    return MARK.search(COMMENT.sub("", text)) is not None


def render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
) -> str:
    """Return the text of a conversation.

    Raises:
        TemplateRefusal: the template raised.
    """
    return _render(template, messages, tools, add_generation_prompt)[0]


def render_with_marks(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text as `render` does, and [start, end) of each {% generation %} block in it."""
    return _render(template, messages, tools, with_marks=True)


def _render(
    template: ChatTemplate,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] = (),
    add_generation_prompt: bool = False,
    with_marks: bool = False,
) -> tuple[str, list[tuple[int, int]]]:
    template = template.for_tools(tools)
    # As in transformers, a token that the tokenizer lacks is undefined in the template.
    tokens = {"bos_token": template.bos_token, "eos_token": template.eos_token}
    defined: dict[str, Any] = {name: text for name, text in tokens.items() if text}
    try:
        compiled = compiled_template(template.text)
        if template.date:
            # Every process and every start then renders alike.
            compiled.globals[DATE_FUNCTION] = datetime.fromisoformat(template.date).strftime
        # transformers caches compiled templates; its own work is a tenth of the time.
        with rendering():
            result: Any = render_jinja_template(
                [[dict(message) for message in as_served(messages)]],
                tools=[dict(tool) for tool in tools] or None,
                chat_template=template.text,
                add_generation_prompt=add_generation_prompt,
                return_assistant_tokens_mask=with_marks,
                **defined,
                **template.option_values,
            )
    except jinja2.UndefinedError as error:
        raise TemplateRefusal(f"{UNDEFINED}: {error}") from error
    except jinja2.TemplateError as error:
        raise TemplateRefusal(str(error)) from error
    except TooSlow as error:
        raise TemplateRefusal(str(error)) from error
    except Exception as error:  # a template is a program: it can fail in any way
        raise TemplateRefusal(f"{type(error).__name__}: {error}") from error
    texts, marks = result
    return texts[0], marks[0] if with_marks else []


def compiled_template(text: str) -> jinja2.Template:
    """Return transformers' compiled form of a template, from its sandbox.

    transformers caches one for each source; its globals are specific to that template.
    """
    template = _compile_jinja_template(text)
    write: Any = template.root_render_func
    if not hasattr(write, "__wrapped__"):
        template.root_render_func = wraps(write)(lambda context: bounded(write(context)))
    return template


def as_served(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return messages with tool calls in the form that vLLM gives to a template.

    JSON text arguments become objects (the API writes text, templates expect objects), and null
    content becomes "" (some templates would write "None").
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
    """Return the text that asks for an answer after a user's message, "" if it is not separable."""
    messages = [{"role": "user", "content": "a"}]
    try:
        plain, asking = render(template, messages), render(template, messages, (), True)
    except TemplateRefusal:
        return ""
    return asking[len(plain) :] if asking.startswith(plain) else ""
