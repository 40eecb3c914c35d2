"""Tool calls and tool schemas in the form that OpenAI-style servers give to chat templates.

    {"name": f, "arguments": {...}}     -> {"type": "function", "function": {...}}, as vLLM has it
    arguments as JSON text              -> the object; "", null and "null" are {}
    {"name": f, "parameters": {...}}    -> {"type": "function", "function": {...}}

A list of calls or of schemas may be JSON text, and so may each item of it. The arguments then
become an object, so that a chat template's `tojson` writes the call and not a quoted string.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torchprime.data.shared.fields import (
    BAD_ARGUMENTS,
    BAD_FUNCTION_CALL,
    BAD_TOOL_CALLS,
    BAD_TOOLS,
    CALLS_DIFFER,
    FIELD_NOT_UNICODE,
    MISSING,
    TOOLS_DIFFER,
    Unusable,
    check_nested,
    parse_json,
    show,
    type_name,
)

LONGEST_SHARED_TOOLS = 100_000  # characters
Call = dict[str, Any]
Tools = tuple[Mapping[str, Any], ...]


# Calls -------------------------------------------------------------------------------------------


def calls_of(turn: Mapping[str, Any], where: str) -> list[Call]:
    """Return the calls of an assistant's message: `tool_calls`, or the older `function_call`."""
    calls = read_calls(turn.get("tool_calls"), BAD_TOOL_CALLS, where)
    value = turn.get("function_call")
    if value is None:
        return calls
    old = read_calls(value, BAD_FUNCTION_CALL, where, single=True)
    if calls and [call["function"] for call in calls] != [call["function"] for call in old]:
        raise Unusable(CALLS_DIFFER, where.rstrip(": "))
    return calls or old


def read_calls(value: Any, reason: str, where: str, single: bool = False) -> list[Call]:
    """Read a list of calls, or its JSON text; with `single` also one call without a list."""
    if isinstance(value, str):
        value = parse_json(value) if value.strip() else None
        if value is MISSING:
            raise Unusable(reason, f"{where}malformed JSON")
    if value is None:
        return []
    if single and isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise Unusable(reason, where + type_name(value))
    return [_read_call(call, reason, where) for call in value]


def _read_call(call: Any, reason: str, where: str) -> Call:
    if isinstance(call, str):
        call = parse_json(call)
    if not isinstance(call, Mapping):
        found = "malformed JSON" if call is MISSING else type_name(call)
        raise Unusable(reason, f"{where}a list with {found}")
    function = call.get("function")
    # a call without `function`: keys other than name and arguments stay outside of it
    if function is None:
        function = {key: call[key] for key in ("name", "arguments") if key in call}
        call = {key: value for key, value in call.items() if key not in (*function, "function")}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable(reason, f"{where}a call without a name")
    function = {**function, "arguments": _read_arguments(function.get("arguments"), where)}
    if call.get("type") is not None:
        return {**call, "function": function}
    outer = {key: value for key, value in call.items() if key not in ("type", "function")}
    return {**outer, "type": "function", "function": function}


def _read_arguments(value: Any, where: str) -> Mapping[str, Any]:
    """Read the arguments as an object; like servers, read null or blank text as an empty object."""
    if isinstance(value, Mapping):
        return value
    if value is None:
        return {}
    if not isinstance(value, str):
        raise Unusable(BAD_ARGUMENTS, where + type_name(value))
    if not value.strip():
        return {}
    parsed = parse_json(value)
    if isinstance(parsed, dict):
        return parsed
    if parsed is None:  # the text "null"
        return {}
    found = "malformed JSON" if parsed is MISSING else type_name(parsed)
    raise Unusable(BAD_ARGUMENTS, f"{where}{found}: {show(value)}")


# Schemas -----------------------------------------------------------------------------------------


def tools_of(fields: Mapping[str, Any], in_parts: list[Any]) -> Tools:
    """Return the tools of a row: `tools`, the older `functions`, or parts of its messages."""
    found = [read_tools(fields.get("tools")), read_tools(fields.get("functions"))]
    found = [tools for tools in (*found, *map(read_tools, in_parts)) if tools]
    if not found:
        return ()
    if any(tools != found[0] for tools in found):
        raise Unusable(TOOLS_DIFFER)
    return found[0]


def read_tools(value: Any) -> Tools:
    """Read a list of schemas, or the text of one; null and blank text are None."""
    if not isinstance(value, str):
        return _tool_list(value)
    shared = len(value) <= LONGEST_SHARED_TOOLS
    return _shared_tools(value) if shared else _tools_of_text(value)


def _tools_of_text(text: str) -> Tools:
    return _tool_list(parse_json(text) if text.strip() else None)


# Conversations share their tools, so the same text is read and checked once.
_shared_tools = lru_cache(maxsize=256)(_tools_of_text)


def _tool_list(value: Any) -> Tools:
    if value is None:  # the text "null" is None too
        return ()
    if not isinstance(value, list):
        raise Unusable(BAD_TOOLS, "malformed JSON" if value is MISSING else type_name(value))
    tools = tuple(map(_read_tool, value))
    check_nested(tools, FIELD_NOT_UNICODE.format("tools"), "tools")
    return tools


def _read_tool(tool: Any) -> Mapping[str, Any]:
    """Put one schema inside `function`; a tool with a type of its own stays as it is."""
    if isinstance(tool, str):
        tool = parse_json(tool)
    if not isinstance(tool, Mapping):
        found = "malformed JSON" if tool is MISSING else type_name(tool)
        raise Unusable(BAD_TOOLS, f"a list with {found}")
    function, kind = tool.get("function"), tool.get("type")
    if function is None and kind not in (None, "function"):
        return tool
    if function is None:
        function = {k: v for k, v in tool.items() if k not in ("type", "function")}
        tool = {}
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise Unusable(BAD_TOOLS, "a schema without a name")
    if isinstance(function.get("parameters"), str):
        parameters = parse_json(function["parameters"])
        if not isinstance(parameters, dict):
            raise Unusable(BAD_TOOLS, f"parameters: {show(function['parameters'])}")
        function = {**function, "parameters": parameters}
    if kind is not None and function is tool.get("function"):
        return tool
    outer = {k: v for k, v in tool.items() if k not in ("type", "function")}
    return {"type": kind or "function", **outer, "function": function}
