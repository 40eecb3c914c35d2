"""Tool calls and schemas as OpenAI-style servers give them to a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import Row, load_rows, read_row
from torchprime.data.shared.notes import RowNotes

USER = {"role": "user", "content": "u"}
BOT = {"role": "assistant", "content": "b"}
F = {"name": "f", "arguments": {"a": 1}}


def read(record: dict[str, Any], kind: str = "messages") -> Row | Rejection:
    return read_row("f:1", record, kind)


def calls_of(turn: dict[str, Any]) -> Any:
    row = read({"messages": [USER, {"role": "assistant"} | turn, BOT]})
    if isinstance(row, Rejection):
        return row.reason
    return row.messages[1].template["tool_calls"]


@pytest.mark.parametrize(
    ("call", "served"),
    [
        (F, {"type": "function", "function": F}),
        ({"function": F}, {"type": "function", "function": F}),
        ({"id": "c1", "function": F}, {"id": "c1", "type": "function", "function": F}),
        (
            {"id": "c1", "type": "function", "function": F, "index": 0},
            {"id": "c1", "type": "function", "function": F, "index": 0},
        ),
        ({"id": "c1", "type": None} | F, {"id": "c1", "type": "function", "function": F}),
        ({"type": "custom", "function": F}, {"type": "custom", "function": F}),
    ],
)
def test_a_call_has_its_function_inside(call: dict, served: dict) -> None:
    for given in ([call], json.dumps([call]), [json.dumps(call)]):
        assert calls_of({"tool_calls": given}) == [served]


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(
    ("arguments", "served"),
    [
        ('{"a": 1}', {"a": 1}),
        ({"a": 1}, {"a": 1}),
        *((none, {}) for none in ("", " \n", None, "null", " null ", "{}", {})),
    ],
)
def test_arguments_are_an_object(arguments: object, served: dict, nested: bool) -> None:
    call: dict = {"name": "f", "arguments": arguments}
    wanted = [{"type": "function", "function": {"name": "f", "arguments": served}}]
    assert calls_of({"tool_calls": [{"function": call} if nested else call]}) == wanted
    assert calls_of({"function_call": call, "content": ""}) == wanted
    assert calls_of({"tool_calls": [{"name": "f"}]})[0]["function"] == {
        "name": "f",
        "arguments": {},
    }


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        ("not JSON", "malformed JSON: 'not JSON'"),
        ('{"a": 1', "malformed JSON: '{\"a\": 1'"),
        ("[1]", "a list: '[1]'"),
        ('"{}"', "a string: '\"{}\"'"),
        ("3", "a number: '3'"),
        (3, "a number"),
        ([1], "a list"),
        (False, "a boolean"),
    ],
)
def test_other_arguments_are_rejected_with_what_was_found(arguments: object, found: str) -> None:
    turn = {"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}
    row = read({"messages": [USER, turn]})
    reason = "arguments of a tool call are not a JSON object"
    assert row == Rejection("f:1", reason, f"message 2: {found}")


CALLS = "tool_calls is not a list of calls with a name"


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        (F, CALLS),
        ("{}", CALLS),
        ("[{", CALLS),
        ([None], CALLS),
        (["[{"], CALLS),
        ([{}], CALLS),
        ([{"function": {"arguments": {}}}], CALLS),
        ([{"function": "f"}], CALLS),
        ([{"name": 3}], CALLS),
        # A surrogate that only appears once the arguments are parsed, and one in a key.
        ([{"name": "f", "arguments": '{"a": "\\ud83d"}'}], "message is not valid Unicode"),
        ([{"name": "f", "arguments": {"\ud83d": 1}}], "message is not valid Unicode"),
        (
            [{"name": "f", "arguments": '{"a":' + "[" * 300 + "]" * 300 + "}"}],
            "nested more than 64 levels deep",
        ),
    ],
)
def test_rejected_tool_calls(calls: object, reason: str) -> None:
    assert calls_of({"content": "x", "tool_calls": calls}) == reason


# The old form ------------------------------------------------------------------------------------


def test_function_call_and_functions_are_converted() -> None:
    schema = {"name": "f", "description": "d", "parameters": {"type": "object"}}
    turns = [
        USER,
        BOT | {"function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": None, "function_call": json.dumps(F)},
        {"role": "function", "name": "f", "content": "2"},
        BOT,
    ]
    row = read({"messages": turns, "functions": [schema]})
    assert isinstance(row, Row)
    call = {"type": "function", "function": F}
    assert [dict(message.template) for message in row.messages] == [
        USER,
        BOT | {"tool_calls": [call]},
        {"role": "tool", "content": "1", "name": "f"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "2", "name": "f"},
        BOT,
    ]
    assert row.tools == ({"type": "function", "function": schema},)


def test_both_forms_have_to_say_the_same() -> None:
    same = {"content": "x", "function_call": F, "tool_calls": [{"id": "1", "function": F}]}
    assert calls_of(same) == [{"id": "1", "type": "function", "function": F}]
    for other in ([F, F], [F | {"arguments": {}}]):
        assert (
            calls_of(same | {"tool_calls": other})
            == "tool_calls and function_call are given and differ"
        )
    assert calls_of({"function_call": "auto"}) == "function_call is not JSON of calls with a name"
    chat = {"messages": [USER, BOT]}
    row = read(
        chat
        | {"tools": [{"type": "function", "function": {"name": "f"}}], "functions": [{"name": "f"}]}
    )
    assert isinstance(row, Row) and len(row.tools) == 1
    row = read(chat | {"tools": [{"name": "g"}], "functions": [{"name": "f"}]})
    assert isinstance(row, Rejection) and row.reason == "tools and functions are given and differ"


def test_calls_of_another_role_are_reported() -> None:
    notes = RowNotes()
    row = read_row("f:1", {"messages": [USER | {"tool_calls": [F]}, BOT]}, "messages", notes=notes)
    assert isinstance(row, Row) and row.messages[0].template == USER
    assert list(notes.unused) == ["messages.tool_calls on a turn of role user"]


# Schemas -----------------------------------------------------------------------------------------

SCHEMA = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": SCHEMA}


@pytest.mark.parametrize(
    ("tool", "served"),
    [
        (SCHEMA, WRAPPED),
        (WRAPPED, WRAPPED),
        ({"function": SCHEMA}, WRAPPED),
        ({"function": SCHEMA, "strict": True}, WRAPPED | {"strict": True}),
        ({"type": "function"} | SCHEMA, WRAPPED),  # the Responses API's form
        ({"type": None, "function": None} | SCHEMA, WRAPPED),  # as Arrow fills in
        (SCHEMA | {"parameters": json.dumps(SCHEMA["parameters"])}, WRAPPED),
        ({"type": "code_interpreter"}, {"type": "code_interpreter"}),
    ],
)
def test_schemas_have_their_function_inside(tool: dict, served: dict) -> None:
    chat = {"messages": [USER, BOT]}
    for tools in ([tool], json.dumps([tool]), [json.dumps(tool)]):
        for kind, record in (
            ("messages", chat),
            ("prompt_completion", {"prompt": [USER], "completion": [BOT]}),
        ):
            row = read(record | {"tools": tools}, kind)
            assert isinstance(row, Row) and row.tools == (served,)


def test_no_tools() -> None:
    for none in (None, "", " ", "null", "[]", []):
        row = read({"messages": [USER, BOT], "tools": none, "functions": none})
        assert isinstance(row, Row) and row.tools == ()


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        *(
            (bad, "tools is not a list of objects")
            for bad in ({"a": 1}, ["f"], "[1]", '[{"a": ', 5)
        ),
        ('{"name": "f"}', "tools is not a list of objects"),
        ([{"a": 1}], "tools is not a list of objects"),
        ([{"function": "f"}], "tools is not a list of objects"),
        ([{"name": "f", "parameters": "x"}], "tools is not a list of objects"),
        ([{"name": "\ud800"}], "field tools is not valid Unicode"),
    ],
)
def test_rejected_tools(tools: object, reason: str) -> None:
    for key in ("tools", "functions"):
        row = read({"messages": [USER, BOT], key: tools})
        assert isinstance(row, Rejection) and row.reason == reason


def test_users_cases(shared_dir: Path) -> None:
    """Rows as they were reported to other trainers."""

    def first(name: str) -> Row:
        path = shared_dir / "cases/data" / name
        return load_rows(SourceSpec(file_dataset_path=str(path)), 1)[0]

    call = first("function_call/with_text.jsonl").messages[1].template
    assert call["content"] == "I will read the gauge."
    assert call["tool_calls"][0]["function"]["arguments"] == {"harbour": "Skerry"}
    assert first("tool_args/empty_str.jsonl").messages[1].template["tool_calls"] == [
        {"id": "c1", "type": "function", "function": {"name": "ring", "arguments": {}}}
    ]
    (tool,) = first("sharegpt/bare_tools.jsonl").tools
    assert list(tool) == ["type", "function"] and tool["function"]["name"] == "tide_height"
