"""The fields `system` and `history`, which rows of every kind may have.

    system    text
    history   [[user's text, assistant's text], ...], or a list of messages; or its JSON text

In a conversation they are its first turns, and the assistant's turns of the history carry loss like
all others. Before a plain prompt they are context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchprime.data.messages.read import Message, keys_found, read_messages
from torchprime.data.shared.fields import (
    BAD_HISTORY,
    MISSING,
    TWO_SYSTEMS,
    Unusable,
    parse_json,
    string_of,
    type_name,
)
from torchprime.data.shared.notes import RowFindings

OPENING_ROLES = ("system", "developer")


def read_system(fields: dict[str, Any], columns: Mapping[str, str]) -> str:
    """Return the system prompt; "" if there is none or it is blank."""
    if fields.get("system") is None:
        return ""
    system = string_of(fields, "system", columns, may_be_empty=True)
    return system if system.strip() else ""


def read_history(
    fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> list[Message]:
    """Return the turns before the row's own."""
    value = fields.get("history")
    if isinstance(value, str):
        value = parse_json(value) if value.strip() else None
    if value is None:
        return []
    if not isinstance(value, list):
        raise Unusable(BAD_HISTORY, "malformed JSON" if value is MISSING else type_name(value))
    if all(isinstance(turn, Mapping) for turn in value):
        return read_messages(value, keys_found(columns, "history", value), found)
    turns: list[dict[str, str]] = []
    for number, pair in enumerate(value, start=1):
        texts = isinstance(pair, list | tuple) and all(isinstance(text, str) for text in pair)
        if not texts or len(pair) != 2:
            raise Unusable(BAD_HISTORY, f"item {number} is no pair of texts: {_found(pair)}")
        user, assistant = pair
        turns.append({"role": "user", "content": user})
        turns.append({"role": "assistant", "content": assistant})
    return read_messages(turns, keys_found({}, "history", turns), found)


def _found(pair: Any) -> str:
    if isinstance(pair, list | tuple):
        return f"{len(pair)} items ({', '.join(map(type_name, pair[:3]))})"
    return type_name(pair)


def history_pairs(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return the history as pairs of texts, for a plain prompt."""
    roles = [message.role for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise Unusable(
            BAD_HISTORY, f"a plain prompt takes pairs of user and assistant: {roles[:6]}"
        )
    if any("tool_calls" in message.template for message in messages):
        raise Unusable(BAD_HISTORY, "a plain prompt takes no tool calls")
    texts = [message.content for message in messages]
    return list(zip(texts[::2], texts[1::2], strict=True))


def with_context(
    messages: list[Message], fields: dict[str, Any], columns: Mapping[str, str], found: RowFindings
) -> list[Message]:
    """Return a conversation that begins with the turns of its row's `system` and `history`."""
    system = read_system(fields, columns)
    if system:
        if messages and messages[0].role == "system":
            raise Unusable(TWO_SYSTEMS)
        messages = [Message({"role": "system", "content": system}), *messages]
    if fields.get("history") is None:
        return messages
    history = read_history(fields, columns, found)
    opening = next(
        (n for n, message in enumerate(messages) if message.role not in OPENING_ROLES),
        len(messages),
    )
    if history and history[0].role == "system" and opening:
        raise Unusable(TWO_SYSTEMS)
    return [*messages[:opening], *history, *messages[opening:]]
