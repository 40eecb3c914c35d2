"""Lists of messages that a column holds as JSON text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchprime.data.shared.fields import parse_json

SPEAKERS, TEXTS = ("role", "from"), ("content", "value", "tool_calls", "function_call")


def objects_of_text(text: str) -> list[Any] | None:
    """Return the list of objects that the text holds, or None."""
    if text.lstrip()[:1] != "[":
        return None
    value = parse_json(text)
    whole = isinstance(value, list) and all(isinstance(item, Mapping) for item in value)
    return value if whole else None


def turns_of_text(text: str) -> list[Any] | None:
    """Return the list of turns that the text holds, or None.

    Each object needs a speaker and content; any other JSON could be plain text, such as a prompt
    that shows JSON.
    """
    value = objects_of_text(text)
    return value if value and all(map(_is_turn, value)) else None


def _is_turn(item: Mapping[str, Any]) -> bool:
    return any(k in item for k in SPEAKERS) and any(k in item for k in TEXTS)
