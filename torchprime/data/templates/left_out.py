"""Parts of a conversation that its text lacks: words of an answer, a system turn, tools."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torchprime.data.templates.reasoning import reasoning_of

NO_SYSTEM = "the chat template leaves out the system turn"
NO_TOOLS = "the chat template leaves out the tools"
NO_REASONING = "the chat template leaves out the reasoning of a turn"


def unsaid(messages: Sequence[Mapping[str, Any]], produced: Mapping[int, str]) -> str:
    """Return the words or calls of an assistant that its span lacks; reasoning may be missing.

    Args:
        produced: by the index of each assistant's message, the text of its span.
    """
    for index, shown in produced.items():
        message, place = messages[index], f"message {index + 1}"
        content = message.get("content")
        if isinstance(content, str) and content.rpartition("</think>")[2].strip() not in shown:
            return f"{place}: its content"
        for call in message.get("tool_calls") or ():
            if _function_name(call) not in shown:
                return f"{place}: the call of {_function_name(call)}"
    return ""


def left_out(
    messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], text: str
) -> tuple[str, ...]:
    """Return the parts of the row that the text lacks, although every answer is complete."""
    found = []
    roles = ("system", "developer")
    instructions = (m.get("content") or "" for m in messages if m.get("role") in roles)
    if any(said.strip() not in text for said in instructions):
        found.append(NO_SYSTEM)
    if tools and not any(_function_name(tool) in text for tool in tools):
        found.append(NO_TOOLS)
    if any(reasoning_of(message).strip() not in text for message in messages):
        found.append(NO_REASONING)
    return tuple(found)


def _function_name(value: Any) -> str:
    """Return the function's name in a tool's schema or in a call."""
    function = value.get("function", value) if isinstance(value, Mapping) else {}
    return str(function.get("name", "")) if isinstance(function, Mapping) else ""
