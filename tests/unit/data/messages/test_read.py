"""Messages of all sources come out in one form: roles, contents, parts, calls that are turns."""

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
SHAREGPT = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "b"}]}
CALL = {"type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
PARSED = {"type": "function", "function": {"name": "f", "arguments": {"a": [1]}}}
TOOL = {"type": "function", "function": {"name": "f"}}
CALL_TEXT = '{"name": "f", "arguments": {"a": [1]}}'


def read(record: dict[str, Any], kind: str = "messages") -> Row | Rejection:
    return read_row("f:9", record, kind)


def accepted(record: dict[str, Any], kind: str = "messages") -> Row:
    row = read(record, kind)
    assert isinstance(row, Row), row
    return row


def refused(record: dict[str, Any], kind: str = "messages") -> Rejection:
    row = read(record, kind)
    assert isinstance(row, Rejection), row
    return row


def templates(row: Row) -> list[dict[str, Any]]:
    return [dict(message.template) for message in row.messages]


def weights(row: Row) -> list[float]:
    return [message.weight for message in row.messages]


def test_messages_keep_what_a_template_sees_and_nothing_else() -> None:
    turns = [
        {"role": "system", "content": "", "id": 3},
        USER | {"name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning": "r"},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f", "tool_calls": None},
        BOT | {"reasoning_content": "x", "thinking": "y", "tool_calls": []},
    ]
    row = accepted({"messages": turns, "tools": [TOOL]})
    assert templates(row) == [
        {"role": "system", "content": ""},
        {"role": "user", "content": "u", "name": "Ann"},
        {"role": "assistant", "content": None, "tool_calls": [PARSED], "reasoning": "r"},
        {"role": "tool", "content": "1", "tool_call_id": "c1", "name": "f"},
        {"role": "assistant", "content": "b", "reasoning_content": "x", "thinking": "y"},
    ]
    assert (row.kind, row.tools, row.prompt, row.completion) == ("messages", (TOOL,), "", "")
    assert CALL["function"]["arguments"] == '{"a": [1]}'  # the record is left as it was


ROLE_NAMES = [
    *((name, "user") for name in ("human", "prompter")),
    *((name, "assistant") for name in ("gpt", "model", "chatgpt", "bot")),
    *((name, "tool") for name in ("function", "ipython", "observation", "function_response")),
    *(("tool_response", "tool"), ("developer", "developer"), ("system", "system")),
]


@pytest.mark.parametrize(("given", "role"), ROLE_NAMES)
def test_roles_have_one_name_in_all_kinds(given: str, role: str) -> None:
    row = accepted({"messages": [{"role": given, "content": "x"}, BOT]})
    assert row.messages[0].role == role
    turns = [{"from": given, "value": "x"}, {"from": "gpt", "value": "b"}]
    assert accepted({"conversations": turns}, "sharegpt").messages[0].role == role


def test_two_user_turns_in_a_row_and_an_answer_first_are_left_to_the_template() -> None:
    assert len(accepted({"messages": [USER, USER, BOT, BOT]}).messages) == 4
    assert len(accepted({"messages": [BOT, USER]}).messages) == 2


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("hello", "message is not an object"),
        ({"content": "x"}, "message has no role"),
        ({"role": None, "content": "x"}, "message has no role"),
        ({"role": "narrator", "content": "x"}, "unknown role"),
        ({"role": ["user"], "content": "x"}, "unknown role"),
        ({"role": "user", "content": None}, "message content is null"),
        ({"role": "user"}, "message content is null"),
        ({"role": "user", "content": None, "tool_calls": [CALL]}, "message content is null"),
        (BOT | {"content": None}, "message content is null"),
        (BOT | {"content": None, "weight": 0}, "message content is null"),
        (BOT | {"content": None, "tool_calls": []}, "message content is null"),
        (BOT | {"content": 4}, "message content is not text"),
        (BOT | {"content": {"text": "x"}}, "message content is not text"),
        (BOT | {"content": ["x"]}, "message content is not text"),
        (BOT | {"content": [{"type": "text", "text": 3}]}, "message content is not text"),
        (BOT | {"content": ""}, "message content is empty"),
        (BOT | {"content": " \n"}, "message content is empty"),
        (BOT | {"content": []}, "message content is empty"),
        (BOT | {"name": 3}, "message name is not a string"),
        (BOT | {"reasoning_content": ["x"]}, "message reasoning_content is not a string"),
        (BOT | {"content": "\udc00"}, "message is not valid Unicode"),
        (BOT | {"thinking": "\udc00"}, "message is not valid Unicode"),
    ],
)
def test_rejected_messages(turn: object, reason: str) -> None:
    rejected = refused({"messages": [USER, turn, BOT]})
    assert rejected.reason == reason
    assert rejected.detail.startswith("message 2")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "field messages is empty"),
        ({"messages": None}, "field messages is null"),
        ({"messages": "[]"}, "field messages is empty"),
        ({"messages": "[1]"}, "field messages is not a list"),
        ({"messages": '[{"role": "us'}, "field messages is not a list"),
        ({"messages": "hello"}, "field messages is not a list"),
        ({"messages": {"role": "user"}}, "field messages is not a list"),
        ({"other": []}, "field messages is missing"),
        ({"messages": [{"role": "system", "content": "s"}]}, "no assistant turn to learn from"),
        ({"messages": [USER, USER]}, "no assistant turn to learn from"),
        ({"messages": [USER, BOT | {"weight": 0}]}, "every assistant turn has weight 0"),
        ({"messages": [USER, BOT | {"train": False}]}, "every assistant turn has weight 0"),
    ],
)
def test_rejected_conversations(record: dict, reason: str) -> None:
    assert refused(record).reason == reason


def test_lists_may_be_json_text() -> None:
    """Messages as JSON text, as in CSV files and in Parquet files of some exporters."""
    turns = [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}, BOT]
    whole = accepted({"messages": turns, "tools": [TOOL]})
    for text in (json.dumps(turns), "\n " + json.dumps(turns)):
        assert accepted({"messages": text, "tools": json.dumps([TOOL])}) == whole
    as_texts = [turns[0], turns[1] | {"tool_calls": json.dumps([CALL])}, BOT]
    item_texts = [turns[0], turns[1] | {"tool_calls": [json.dumps(CALL)]}, BOT]
    for messages in (as_texts, item_texts):
        assert accepted({"messages": messages, "tools": [json.dumps(TOOL)]}) == whole
    text = json.dumps(SHAREGPT["conversations"])
    assert accepted({"conversations": text}, "sharegpt") == accepted(SHAREGPT, "sharegpt")


def test_a_prompt_that_shows_json_stays_text() -> None:
    text = json.dumps([USER])
    for record in ({"prompt": text, "completion": "c"}, {"prompt": "p", "completion": text}):
        notes = RowNotes()
        row = read_row("f:1", record, "prompt_completion", notes=notes)
        assert row == Row("f:1", "prompt_completion", record["prompt"], record["completion"])
        (noticed,) = notes.noticed
        assert "is JSON text of messages" in noticed
        assert noticed.startswith("prompt" if record["prompt"] == text else "completion")
    other = {"prompt": '[{"a": 1}]', "completion": '[{"role": 3}]'}
    row = accepted(other, "prompt_completion")
    assert (row.prompt, row.completion) == (other["prompt"], other["completion"])
    both = {"prompt": text, "completion": json.dumps([BOT])}
    assert templates(accepted(both, "prompt_completion")) == [USER, BOT]


# Content parts -----------------------------------------------------------------------------------


def test_content_parts_are_joined() -> None:
    parts = [
        {"type": "text", "text": "a "},
        {"type": "text", "value": "b"},
        {"type": "text", "text": None, "value": "\n"},  # as Arrow fills in
        {"type": "input_text", "text": "c"},
    ]
    row = accepted({"messages": [{"role": "user", "content": parts}, BOT]})
    assert row.messages[0].template == {"role": "user", "content": "a b\nc"}
    refusal = [{"type": "refusal", "refusal": "No."}]  # servers feed it as the text it is
    assert accepted({"messages": [USER, BOT | {"content": refusal}]}).messages[1].content == "No."


@pytest.mark.parametrize(
    ("parts", "template"),
    [
        (
            [("reasoning", "r1 "), ("reasoning", "r2"), ("text", "t")],
            {"content": "t", "reasoning_content": "r1 r2"},
        ),
        ([("tool_call", CALL_TEXT)], {"content": None, "tool_calls": [PARSED]}),
        (
            [("text", "t"), ("tool_call", CALL_TEXT), ("tool_call", CALL_TEXT)],
            {"content": "t", "tool_calls": [PARSED, PARSED]},
        ),
        ([("tool_calls", f"[{CALL_TEXT}]")], {"content": None, "tool_calls": [PARSED]}),
    ],
)
def test_parts_of_llama_factory(parts: list, template: dict) -> None:
    content = [{"type": kind, "value": value} for kind, value in parts]
    row = accepted({"messages": [USER, {"role": "assistant", "content": content}]})
    assert templates(row)[1] == {"role": "assistant"} | template


def test_tools_in_a_part() -> None:
    content = [
        {"type": "text", "value": "s"},
        {"type": "tools", "value": json.dumps([{"name": "f"}])},
    ]
    record = {"messages": [{"role": "system", "content": content}, USER, BOT]}
    row = accepted(record)
    assert (row.tools, row.messages[0].content) == ((TOOL,), "s")
    assert accepted(record | {"tools": [TOOL]}).tools == (TOOL,)
    assert (
        refused(record | {"tools": [{"name": "g"}]}).reason
        == "tools and functions are given and differ"
    )


@pytest.mark.parametrize(
    ("role", "part", "detail"),
    [
        *(
            ("user", {"type": kind, kind: {"url": "x"}}, f"content part of type {kind}: only text")
            for kind in ("image_url", "input_audio", "image", "video_url", "file", "thinking")
        ),
        ("user", {"type": "tool_call", "value": CALL_TEXT}, "content part of type tool_call"),
        ("user", {"type": "reasoning", "value": "r"}, "content part of type reasoning"),
        ("user", {"text": "x"}, "content part of type null"),
    ],
)
def test_parts_that_are_no_text_are_rejected_by_name(role: str, part: dict, detail: str) -> None:
    rejected = refused({"messages": [{"role": role, "content": [part]}, BOT]})
    assert rejected.reason == "message content is not text"
    assert detail in rejected.detail


def test_reasoning_twice() -> None:
    part = [{"type": "reasoning", "value": "r"}, {"type": "text", "value": "t"}]
    same = BOT | {"content": part, "reasoning_content": "r"}
    assert templates(accepted({"messages": [USER, same]}))[1]["reasoning_content"] == "r"
    differs = refused({"messages": [USER, same | {"reasoning_content": "x"}]})
    assert differs.reason == "reasoning of an answer is given twice and differs"


# Turns that are calls ----------------------------------------------------------------------------


@pytest.mark.parametrize("role", ["tool_call", "function_call"])
def test_a_turn_of_calls_is_part_of_the_answer_it_follows(role: str) -> None:
    """A server produces text and calls as one turn, and so do Swift's and Automodel's readers."""
    turns = [
        USER,
        BOT,
        {"role": role, "content": CALL_TEXT},
        {"role": role, "content": '[{"name": "g"}]'},
        {"role": "tool_response", "content": "1"},
        {"role": role, "content": {"name": "f", "arguments": ""}},
        {"role": "tool", "content": "2"},
        BOT,
    ]
    row = accepted({"messages": turns})
    g = {"type": "function", "function": {"name": "g", "arguments": {}}}
    f = {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert templates(row) == [
        USER,
        BOT | {"tool_calls": [PARSED, g]},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": None, "tool_calls": [f]},
        {"role": "tool", "content": "2"},
        BOT,
    ]
    renamed = [{"from": turn["role"], "value": turn["content"]} for turn in turns]
    assert accepted({"conversations": renamed}, "sharegpt").messages == row.messages
    # Calls of the assistant's own, and an answer behind calls, are turns as they stand.
    own = [USER, BOT, {"role": "assistant", "content": None, "tool_calls": [CALL]}, BOT]
    assert len(accepted({"messages": own}).messages) == 4


def test_one_answer_has_one_weight() -> None:
    call = {"role": "tool_call", "content": CALL_TEXT}
    reason = "turns that make up one answer have different weights"
    assert refused({"messages": [USER, BOT | {"loss": False}, call, BOT]}).reason == reason
    assert refused({"messages": [USER, BOT, call | {"weight": 2}]}).reason == reason
    off = {"loss": False}
    assert weights(accepted({"messages": [USER, BOT | off, call | off, USER, BOT]})) == [1, 0, 1, 1]
    split = {"prompt": [USER, BOT], "completion": [call]}
    assert refused(split, "prompt_completion").reason == reason


def test_sharegpt_becomes_messages() -> None:
    turns = [
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}', "weight": 2},
        {"from": "observation", "value": "{}"},
        {"from": "chatgpt", "value": "b", "train": False},
        {"from": "human", "value": "v"},
        {"from": "function_call", "value": '[{"name": "g", "arguments": "{}"}]'},
        {"from": "function_response", "value": ""},
        {"from": "tool", "value": "t"},
    ]
    row = accepted(
        {"conversations": turns, "system": "Be kind.", "tools": '[{"name": "f"}]'}, "sharegpt"
    )
    functions = [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]
    calls = [{"type": "function", "function": function} for function in functions]
    assert templates(row) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": None, "tool_calls": calls[:1]},
        {"role": "tool", "content": "{}"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "v"},
        {"role": "assistant", "content": None, "tool_calls": calls[1:]},
        {"role": "tool", "content": ""},
        {"role": "tool", "content": "t"},
    ]
    assert weights(row) == [1.0, 1.0, 2.0, 1.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert (row.kind, row.tools) == ("sharegpt", (TOOL,))
    for none in (None, "", " "):
        assert templates(accepted(SHAREGPT | {"system": none}, "sharegpt")) == [USER, BOT]


FUNCTION_CALL = "function_call is not JSON of calls with a name"
ARGUMENTS = "arguments of a tool call are not a JSON object"


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ({"from": "narrator", "value": "x"}, "unknown role"),
        ({"role": "user", "content": "x"}, "message has no role"),
        ({"from": "human", "content": "x"}, "message content is null"),
        ({"from": "function_call", "value": "f(x)"}, FUNCTION_CALL),
        ({"from": "function_call", "value": '{"arguments": {}}'}, FUNCTION_CALL),
        ({"from": "function_call", "value": '{"name": "f", "arguments": 1}'}, ARGUMENTS),
        ({"from": "function_call", "value": "[]"}, FUNCTION_CALL),
        ({"from": "function_call", "value": "null"}, FUNCTION_CALL),
        ({"from": "function_call", "value": None}, FUNCTION_CALL),
        ({"from": "function_call", "value": "[" * 100_000}, FUNCTION_CALL),
    ],
)
def test_rejected_sharegpt(turn: dict, reason: str) -> None:
    record = {"conversations": [turn, *SHAREGPT["conversations"]]}
    assert refused(record, "sharegpt").reason == reason


# Real rows ---------------------------------------------------------------------------------------


def test_real_tool_calls_and_weights(shared_dir: Path) -> None:
    def rows_of(name: str) -> list[Row]:
        return load_rows(SourceSpec(file_dataset_path=str(shared_dir / "data" / name)), 1000)

    for name, count in (
        ("sgd_dev_messages.jsonl", 1587),
        ("llamafactory_glaive_toolcall_en_demo.json", 211),
    ):
        rows = rows_of(name)
        turns = [message.template for row in rows for message in row.messages]
        calls = [call for turn in turns for call in turn.get("tool_calls", [])]
        assert sum("tool_calls" in turn for turn in turns) == count
        assert all(isinstance(call["function"]["arguments"], dict) for call in calls)
        assert sum(turn["role"] == "tool" for turn in turns) == count
        assert all(set(t) == {"type", "function"} for row in rows for t in row.tools)
    for row in rows_of("llamafactory_v1_sft_demo.jsonl"):
        assert [(m.role, m.weight) for m in row.messages] == [("user", 0.0), ("assistant", 1.0)]


def test_a_usual_message_is_reported_with_nothing() -> None:
    notes = RowNotes()
    read_row(
        "f:1", {"messages": [USER, BOT | {"name": None, "lang": None}]}, "messages", notes=notes
    )
    assert notes.to_dict() == {"unused_keys": {}, "noticed": {}}


def test_bytes_in_arguments_and_tools_are_no_text() -> None:
    call = {"name": "f", "arguments": {"a": [b"\xff"]}}
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]
    found = read_row("f:1", {"messages": turns}, "messages")
    assert isinstance(found, Rejection)
    assert found.detail == "message 2: 1 bytes that are not UTF-8"
    spoken = [turns[0], {"role": "assistant", "content": "a"}]
    tools = [{"name": "f", "parameters": {"x": b"\xff\xfe"}}]
    found = read_row("f:1", {"messages": spoken, "tools": tools}, "messages")
    assert isinstance(found, Rejection) and found.detail == "tools: 2 bytes that are not UTF-8"
