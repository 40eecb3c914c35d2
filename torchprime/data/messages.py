"""One form for the messages of all sources: OpenAI's, ShareGPT's and what is between.

Roles become system, developer, user, assistant and tool, content a string, and the arguments of a
tool call an object where they were the text of one (what a chat template writes with `tojson` is
then the call, not a quotation of it).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from torchprime.data.fields import (
    BAD_FUNCTION_CALL,
    BAD_TOOL_CALLS,
    BAD_TOOLS,
    CONTENT_EMPTY,
    CONTENT_NOT_TEXT,
    CONTENT_NULL,
    FIELD_NOT_UNICODE,
    MESSAGE_NO_ROLE,
    MESSAGE_NOT_OBJECT,
    MESSAGE_NOT_STRING,
    MESSAGE_NOT_UNICODE,
    MESSAGE_TRAIN,
    MESSAGE_WEIGHT,
    MESSAGE_WEIGHTS_DIFFER,
    MISSING,
    UNKNOWN_ROLE,
    Unusable,
    check_nested,
    parse_json,
    printable,
    show,
    type_name,
    weight_of,
)

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool"},
}
FUNCTION_CALL = "function_call"
SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user", "tool": "tool"},
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", FUNCTION_CALL), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
# What else of a message a chat template sees; all strings.
MESSAGE_STRINGS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
LONGEST_SHARED_TOOLS = 100_000  # characters


@dataclass(frozen=True)
class Message:
    """One turn. `template` is what a chat template sees: role, content, tool_calls and the like.

    `content` is a string, or None for an assistant that only calls tools. `weight` scales the loss
    of an assistant turn, 0 for a turn that is not trained on. `masked` are the characters
    [start, end) of `content` that carry no loss.
    """

    template: Mapping[str, Any]
    weight: float = 1.0
    masked: tuple[tuple[int, int], ...] = ()

    @property
    def role(self) -> str:
        return self.template["role"]

    @property
    def content(self) -> str:
        return self.template.get("content") or ""


@dataclass(frozen=True)
class Keys:
    """Where a message says who speaks and what, and the names it has for roles."""

    role: str
    content: str
    roles: Mapping[str, str]


def message_keys(
    columns: Mapping[str, str], role: str, content: str, roles: Mapping[str, str] = ROLES
) -> Keys:
    """The source's own names for the keys, or else the kind's: `role` and `content`."""
    return Keys(columns.get("message.role", role), columns.get("message.content", content), roles)


def read_message(turn: Any, number: int, keys: Keys, off: bool = False) -> Message:
    """One turn in the common form; `off`: it is context whatever its weight says."""
    where = f"message {number}: "
    if not isinstance(turn, Mapping):
        raise Unusable(MESSAGE_NOT_OBJECT, where + type_name(turn))
    given = turn.get(keys.role)
    if given is None:
        found = ", ".join(sorted(map(str, turn))) or "nothing"
        raise Unusable(MESSAGE_NO_ROLE, printable(f"{where}key {keys.role}; found {found}"))
    role = keys.roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise Unusable(UNKNOWN_ROLE, where + show(given))
    weight = _message_weight(turn, where)
    weight = 0.0 if off else weight

    content = turn.get(keys.content)
    calls = _tool_calls(turn.get("tool_calls"), BAD_TOOL_CALLS, where)
    if given == FUNCTION_CALL:
        value = parse_json(content) if isinstance(content, str) else content
        value = [value] if isinstance(value, Mapping) else value
        calls = [
            {"type": "function", "function": {k: call[k] for k in ("name", "arguments")}}
            for call in _tool_calls(value, BAD_FUNCTION_CALL, where, bare=True)
        ]
        content = None
        if not calls:
            raise Unusable(BAD_FUNCTION_CALL, where + "no call")
    if content is not None or role != "assistant" or not calls:
        content = _content(content, where)
        if role == "assistant" and weight > 0 and not calls and not content.strip():
            raise Unusable(CONTENT_EMPTY, where + role)

    template: dict[str, Any] = {"role": role, "content": content}
    if calls:
        template["tool_calls"] = calls
    for name in MESSAGE_STRINGS:
        value = turn.get(name)
        if value is not None:  # Arrow gives every message the keys that any has
            if not isinstance(value, str):
                raise Unusable(MESSAGE_NOT_STRING.format(name), where + type_name(value))
            template[name] = value
    check_nested(template, MESSAGE_NOT_UNICODE, where.rstrip(": "))
    return Message(template, weight)


def _message_weight(turn: Mapping[str, Any], where: str) -> float:
    given = [turn[key] for key in ("weight", "loss_weight") if turn.get(key) is not None]
    weights = [weight_of(value, MESSAGE_WEIGHT, where) for value in given]
    if len(set(weights)) > 1:
        raise Unusable(MESSAGE_WEIGHTS_DIFFER, f"{where}{weights[0]:g} and {weights[1]:g}")
    train = turn.get("train")
    if train is not None and not isinstance(train, bool):
        raise Unusable(MESSAGE_TRAIN, where + show(train))
    return 0.0 if train is False else (weights or [1.0])[0]


def _content(value: Any, where: str) -> str:
    """A string, or the texts of a list of parts, joined."""
    if value is None:
        raise Unusable(CONTENT_NULL, where.rstrip(": "))
    if isinstance(value, list):
        return "".join(_text_part(part, where) for part in value)
    if not isinstance(value, str):
        raise Unusable(CONTENT_NOT_TEXT, where + type_name(value))
    return value


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise Unusable(CONTENT_NOT_TEXT, f"{where}a list with {type_name(part)}")
    if part.get("type") != "text":
        raise Unusable(CONTENT_NOT_TEXT, f"{where}a part of type {show(part.get('type'))}")
    for key in ("text", "value"):
        if isinstance(part.get(key), str):
            return part[key]
    raise Unusable(CONTENT_NOT_TEXT, f"{where}a part of type text without one")


def _tool_calls(value: Any, reason: str, where: str, bare: bool = False) -> list[dict[str, Any]]:
    """The calls with the text of their arguments parsed where it is an object.

    `bare` calls are {name, arguments}; others may have these inside `function`.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unusable(reason, where + ("malformed JSON" if value is MISSING else type_name(value)))
    calls = []
    for call in value:
        if not isinstance(call, Mapping):
            raise Unusable(reason, f"{where}a list with {type_name(call)}")
        inside = not bare and call.get("function") is not None
        function = call["function"] if inside else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise Unusable(reason, f"{where}a call without a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            parsed = parse_json(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
        elif not isinstance(arguments, Mapping):
            raise Unusable(reason, f"{where}arguments: {type_name(arguments)}")
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if inside else function)
    return calls


# Tools -------------------------------------------------------------------------------------------


def read_tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """A list of objects, or the text of one; null and blank text are none."""
    if not isinstance(value, str):
        return _tool_list(value)
    shared = len(value) <= LONGEST_SHARED_TOOLS
    return _shared_tools(value) if shared else _tools_of_text(value)


def _tools_of_text(text: str) -> tuple[Mapping[str, Any], ...]:
    return _tool_list(parse_json(text) if text.strip() else None)


# Conversations share their tools: the same text is read and checked once.
_shared_tools = lru_cache(maxsize=256)(_tools_of_text)


def _tool_list(value: Any) -> tuple[Mapping[str, Any], ...]:
    if value is None:  # what the text "null" says, too
        return ()
    if not isinstance(value, list):
        raise Unusable(BAD_TOOLS, "malformed JSON" if value is MISSING else type_name(value))
    for tool in value:
        if not isinstance(tool, Mapping):
            raise Unusable(BAD_TOOLS, f"a list with {type_name(tool)}")
    check_nested(value, FIELD_NOT_UNICODE.format("tools"), "tools")
    return tuple(value)
