"""Thousands of odd rows: each is accepted rightly, or rejected with one of the known reasons.

Rows are built from arbitrary JSON in the places of each kind, or by damaging good ones. What
"rightly" means is said a second time here, in a few lines that share nothing with the reader.
"""

from __future__ import annotations

import copy
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchprime.config.sections.dataset import Format
from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.formats import FIELDS, decide_format
from torchprime.data.rows.read import Row, RowReading, open_rows, read_row
from torchprime.data.rows.reader import RowReader
from torchprime.data.rows.row import PLAIN_READING
from torchprime.data.rows.trees import read_trees
from torchprime.data.shared.fields import REASONS
from torchprime.data.shared.notes import RowNotes
from torchprime.errors import DataError

KNOWN_REASON = re.compile(
    "|".join(re.escape(reason).replace(r"\{\}", ".+") for reason in REASONS), re.DOTALL
)


def fuzz(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,  # the same rows on every machine
        database=None,
        suppress_health_check=list(HealthCheck),  # pyright: ignore[reportArgumentType]
    )


# Generated records --------------------------------------------------------------------------------

ODD_TEXT = [
    *("", " \n", "\ud83d", "a\udc00b", "\x00", "x" * 100_000, "null", "[]", "NaN", "5", "\ufeff"),
    *('[{"name": "f", "arguments": "{}"}]', '{"name": "f", "arguments": {"a": "\\ud800"}}'),
    *("user", "assistant", "gpt", "function_call", "tool", "2024-02-29", "{input}", "[" * 50_000),
]
LONE_SURROGATES = st.text("a\ud83d\udc00", min_size=1, max_size=3)
TEXT = st.sampled_from(ODD_TEXT) | st.text(max_size=8) | LONE_SURROGATES
NUMBER = st.sampled_from([0, 1, 10, -1, 11, 0.5, 10**400, 1e308, math.nan, math.inf, True, False])
SCALAR = st.none() | NUMBER | TEXT
JSON = st.recursive(
    SCALAR,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXT | st.sampled_from(["role", "content", "type", "text"]), inner)
    ),
    max_leaves=6,
)
DEEP = {"a": json.loads('{"b":' * 90 + "1" + "}" * 90)}
ANYTHING = JSON | st.just(DEEP) | st.just([DEEP])
WORDS = st.sampled_from(["a", "b c", "é\n", " 12 ", "{x}", "日本"])


def usually(strategy: st.SearchStrategy, else_: st.SearchStrategy = ANYTHING) -> st.SearchStrategy:
    """One time in twenty anything at all, and as often what is odd in its own way."""
    others = {7: ANYTHING, 8: else_}
    return st.integers(0, 19).flatmap(lambda n: others.get(n, strategy))


USUALLY_WORDS = usually(WORDS, TEXT)


def as_text(value: Any) -> str:
    """As a column of text has it."""
    return json.dumps(value)


def some_of(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy:
    return st.fixed_dictionaries(required, optional=optional)


ARGUMENTS = st.sampled_from([{}, {"a": 1}, '{"a": [1]}', "", None, "null", DEEP])
CALL = some_of({"name": USUALLY_WORDS, "arguments": usually(ARGUMENTS, TEXT)}, {"id": SCALAR})
CALLS = usually(st.lists(usually(CALL | st.fixed_dictionaries({"function": CALL})), max_size=2))
CALLS = CALLS | CALLS.map(as_text)
SWITCH = usually(st.sampled_from([None, None, True, False, 0, 1]))
PART = some_of(
    {"begin_offset": st.integers(-1, 3), "end_offset": st.integers(0, 3), "train": SWITCH}, {}
)
EXTRAS = {
    "weight": usually(st.sampled_from([0, 1, 2.5, 10]), NUMBER),
    "loss_weight": usually(st.sampled_from([None, None, None, 1])),
    "train": usually(st.sampled_from([None, True, False])),
    "name": USUALLY_WORDS,
    "reasoning_content": USUALLY_WORDS,
}
MORE_EXTRAS = {
    "loss": SWITCH,
    "masked": SWITCH,
    "mask": st.none() | SCALAR,
    "train_detail": usually(st.lists(usually(PART), max_size=2)),
    "lang": SCALAR,
    "function_call": usually(CALL | CALL.map(as_text)),
}
PART_KINDS = ("text", "text", "text", "reasoning", "tool_call", "image_url")
PARTS = st.lists(
    usually(
        some_of({"type": st.sampled_from(PART_KINDS), "text": WORDS}, {"cache_control": SCALAR})
        | st.fixed_dictionaries({"type": st.just("tool_call"), "value": CALL.map(as_text)})
    ),
    max_size=2,
)
ROLE = usually(
    st.sampled_from(["system", "user", "human", "assistant", "assistant", "gpt", "tool"])
)
SAID = {"role": ROLE, "content": usually(WORDS | PARTS, TEXT)}
CALL_TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["tool_call", "function_call"]), "content": CALL.map(as_text) | TEXT}
)
TURN = (
    some_of(SAID, {})
    | some_of(SAID, EXTRAS)
    | some_of(SAID, MORE_EXTRAS)
    | some_of(SAID, {"tool_calls": CALLS})
    | CALL_TURN
)
SHAREGPT_TURN = some_of(
    {
        "from": usually(st.sampled_from(["system", "human", "gpt", "observation", "chatgpt"])),
        "value": USUALLY_WORDS,
    },
    EXTRAS | MORE_EXTRAS,
)
FUNCTION_CALL = st.fixed_dictionaries(
    {"from": st.just("function_call"), "value": CALL.map(as_text) | TEXT | CALLS}
)
TURNS = usually(st.lists(usually(TURN), max_size=4))
TURNS = TURNS | TURNS.map(as_text)
PAIR = st.lists(USUALLY_WORDS, min_size=2, max_size=2)
HISTORY = usually(st.lists(usually(PAIR), max_size=2) | st.lists(usually(TURN), max_size=2))
CONTEXT = {"system": usually(WORDS | st.none(), SCALAR), "history": HISTORY | HISTORY.map(as_text)}
OF_ALL = {"weight": usually(st.sampled_from([0, 1, 2.5, 10]), NUMBER), "extra": SCALAR} | CONTEXT
TOOL = st.sampled_from([{"name": "f"}, {"type": "function", "function": {"name": "f"}}, {}])
TOOLS = {"tools": usually(st.lists(usually(TOOL), max_size=2)), "functions": st.none() | JSON}
OF_CHATS = OF_ALL | TOOLS | {"only_last": SWITCH, "mask": st.sampled_from([None, "User", 1])}
NODE = st.recursive(
    some_of({"text": USUALLY_WORDS, "role": ROLE}, {"rank": NUMBER | st.none()}),
    lambda inner: some_of(
        {
            "text": USUALLY_WORDS,
            "role": usually(st.sampled_from(["prompter", "assistant"])),
            "replies": usually(st.lists(usually(inner), max_size=3)),
        },
        {"rank": NUMBER | st.none(), "deleted": SWITCH, "lang": SCALAR},
    ),
    max_leaves=8,
)
FUZZED: dict[str, st.SearchStrategy] = {
    "prompt_completion": some_of({"prompt": USUALLY_WORDS, "completion": USUALLY_WORDS}, OF_ALL)
    | some_of({"prompt": TURNS, "completion": TURNS}, OF_CHATS),
    "question_answer": some_of({"question": USUALLY_WORDS, "answer": USUALLY_WORDS}, OF_ALL),
    "alpaca": some_of(
        {"instruction": USUALLY_WORDS, "output": USUALLY_WORDS}, {"input": USUALLY_WORDS} | OF_ALL
    ),
    "messages": some_of({"messages": TURNS}, {"weight": OF_ALL["weight"], "extra": SCALAR})
    | some_of({"messages": TURNS}, OF_CHATS),
    "sharegpt": some_of(
        {"conversations": usually(st.lists(usually(SHAREGPT_TURN | FUNCTION_CALL), max_size=4))},
        OF_CHATS,
    ),
    "text": some_of({"text": USUALLY_WORDS | TEXT}, OF_ALL),
    "preference": some_of(
        {"chosen": USUALLY_WORDS, "rejected": USUALLY_WORDS}, {"prompt": USUALLY_WORDS} | OF_ALL
    )
    | some_of({"chosen": TURNS, "rejected": TURNS}, {"prompt": TURNS} | OF_CHATS),
    "tree": some_of({"message_tree_id": USUALLY_WORDS, "prompt": usually(NODE)}, OF_ALL),
}

USER = {"role": "user", "content": "q"}
GOOD: dict[str, dict[str, Any]] = {
    "prompt_completion": {"prompt": "p", "completion": "c", "weight": 1},
    "question_answer": {"question": "q", "answer": "a", "id": 3},
    "alpaca": {"instruction": "i", "input": "n", "output": "o", "history": []},
    "messages": {
        "messages": [
            {"role": "system", "content": "s"},
            USER | {"name": "n"},
            {"role": "assistant", "content": [{"type": "text", "text": "a"}], "weight": 2},
            USER,
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]},
            {"role": "tool", "content": "{}"},
            {"role": "assistant", "content": "b", "train": True},
        ],
        "tools": [{"name": "f"}],
    },
    "sharegpt": {
        "conversations": [
            {"from": "human", "value": "q"},
            {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
            {"from": "observation", "value": "1"},
            {"from": "gpt", "value": "a", "loss_weight": 0.5},
        ],
        "system": "s",
        "tools": "[]",
    },
    "text": {"text": "t", "weight": 10},
    "preference": {
        "prompt": [USER],
        "chosen": [USER, {"role": "assistant", "content": "a", "loss": True}],
        "rejected": [USER, {"role": "assistant", "content": "b"}],
        "history": [["u", "b"]],
    },
    "tree": {
        "message_tree_id": "t",
        "prompt": {
            "text": "p",
            "role": "prompter",
            "replies": [
                {"text": "a", "role": "assistant", "rank": 1, "replies": [], "lang": "en"},
                {"text": "b", "role": "assistant", "rank": 0, "deleted": False},
            ],
        },
    },
}
SINGLE = sorted({*GOOD} - {"tree"})  # kinds with one row a record


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The paths of everything inside."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    inner = [(path + (key,), value[key]) for key in keys]
    found = [where for where, _ in inner]
    for where, child in inner:
        found += places(child, where) if isinstance(child, (dict, list)) else []
    return found


@st.composite
def damaged(draw: Callable, kind: str) -> dict[str, Any]:
    """A good row after one to three accidents."""
    row = copy.deepcopy(GOOD[kind])
    for _ in range(draw(st.integers(1, 3))):
        paths = places(row)
        if not paths:
            break
        *outer, key = draw(st.sampled_from(paths))
        parent: Any = row
        for step in outer:
            parent = parent[step]
        action = draw(st.sampled_from(["delete", "replace", "double", "swap", "cut", "wrap"]))
        if action == "delete":
            del parent[key]
        elif action == "replace":
            parent[key] = copy.deepcopy(draw(ANYTHING))
        elif action == "double" and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif action == "double":
            parent[draw(TEXT)] = copy.deepcopy(parent[key])
        elif action == "swap":
            other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else [0]))
            parent[key], parent[other] = parent[other], parent[key]
        elif action == "cut":
            parent[key] = json.dumps(parent[key])[: draw(st.integers(0, 12))]
        else:
            parent[key] = [parent[key]]
    return row


# Expected results ---------------------------------------------------------------------------------


TURN_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
ASSISTANT = {"assistant", "gpt", "chatgpt", "model", "bot", "tool_call", "function_call"}
NAMES = dict.fromkeys(ASSISTANT, "assistant") | dict.fromkeys(("human", "prompter"), "user")
NAMES |= {role: role for role in ("system", "developer", "user", "tool")}
TOOL_NAMES = ("function", "ipython", "observation", "function_response", "tool_response")
NAMES |= dict.fromkeys(TOOL_NAMES, "tool")
IS_CALL = ("tool_call", "function_call")
# Keys that are read, of a row's by kind, of a message's, of a content part's.
READ = {
    "prompt_completion": {"prompt", "completion"},
    "question_answer": {"question", "answer"},
    "alpaca": {"instruction", "input", "output"},
    "messages": {"messages"},
    "sharegpt": {"conversations"},
    "text": {"text"},
    "preference": {"prompt", "chosen", "rejected"},
    "tree": {"message_tree_id", "prompt"},
}
READ_OF_ALL = {"system", "history", "weight"}
READ_OF_CHATS = {"tools", "functions", "only_last", "mask"}
READ_OF_MESSAGES = {"role", "content", "name", "tool_call_id", "reasoning_content", "reasoning"}
READ_OF_MESSAGES |= {"thinking", "tool_calls", "function_call", "weight", "loss_weight"}
READ_OF_MESSAGES |= {"loss_scale", "loss", "train", "training", "trainable", "masked", "mask"}
READ_OF_MESSAGES |= {"train_detail", "training_detail"}
READ_OF_NODES = {"message_id", "parent_id", "message_tree_id", "text", "role", "rank", "deleted"}
READ_OF_NODES |= {"replies"}


def is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 10


def row_weight_is_fine(value: Any) -> bool:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value):
        value = float(value)  # all that a CSV file can say
    return value is None or is_number(value)


def system_is_fine(record: dict[str, Any]) -> bool:
    return record.get("system") is None or is_text(record["system"])


def strings_are_fine(record: dict[str, Any], kind: str) -> bool | None:
    """Return True if a record of strings must be accepted, None for one with a history."""
    if record.get("history") not in (None, "", [], "[]"):
        return None
    may_be_empty = {"prompt", "input"} if kind != "preference" else set()
    names = [*FIELDS[kind], *(["input"] if record.get("input") is not None else [])]
    if kind == "preference":
        names = ["prompt", "chosen"]
    for name in names if kind in ("alpaca", "preference") else FIELDS[kind]:
        value = record.get(name)
        if not is_text(value) or not (value.strip() or name in may_be_empty):
            return False
    return row_weight_is_fine(record.get("weight")) and system_is_fine(record)


def assert_strings_right(row: Row, record: dict[str, Any], kind: str) -> None:
    names = ("prompt", "chosen") if kind == "preference" else FIELDS[kind]
    *context, answer = (record[name] for name in names)
    system = record.get("system") or ""
    assert row.completion == answer
    assert all(text in row.prompt for text in context)
    assert row.prompt.startswith(system) or not system.strip() or kind == "text"
    if not system.strip() and not record.get("history") and kind == "prompt_completion":
        assert row.prompt == record["prompt"]
    assert not row.messages and not row.tools


def lists_of(record: dict[str, Any], kind: str) -> list[Any]:
    """A conversation's own turns, read where they are JSON text."""
    names = {"prompt_completion": ("prompt", "completion")}.get(kind, FIELDS[kind])
    values = [record[name] for name in names]
    return [json.loads(value) if isinstance(value, str) else value for value in values]


def merged(turns: list[dict[str, Any]], names: tuple[str, str]) -> list[tuple[str, Any]]:
    """(role, content) of each message: calls join the assistant's turn in front of them."""
    found: list[tuple[str, Any]] = []
    for turn in turns:
        role, content = (turn.get(name) for name in names)
        is_call = role in IS_CALL
        if is_call and found and found[-1][0] == "assistant":
            continue
        assert isinstance(role, str)
        found.append((NAMES[role], None if is_call else content))
    return found


def assert_messages_right(row: Row, record: dict[str, Any], kind: str) -> None:
    lists = lists_of(record, kind)
    names = TURN_KEYS.get(kind, ("role", "content"))
    wanted = [pair for turns in lists for pair in merged(turns, names)]
    context = len(merged(lists[0], names)) if kind == "prompt_completion" else 0
    assert len(row.messages) >= len(wanted)
    if not record.get("history"):
        assert len(row.messages) - len(wanted) == bool((record.get("system") or "").strip())
    opening = 1 if wanted[0][0] in ("system", "developer") else 0
    own = row.messages[len(row.messages) - len(wanted) :]
    if opening and record.get("history"):
        own = ()  # the history stands between the row's own turns
    for number, (message, (role, content)) in enumerate(zip(own, wanted, strict=False)):
        assert message.role == role
        got = message.template["content"]
        if isinstance(content, list):
            texts = [p.get("text") or p.get("value") or "" for p in content if p["type"] == "text"]
            assert (got or "") == "".join(texts)
        else:
            assert got == content
        assert isinstance(got, str) or message.template["tool_calls"]
        assert message.weight == 0 or number >= context
        assert all(0 <= a < b <= len(message.content) for a, b in message.masked)
    for message in row.messages:
        text = json.dumps(message.template, ensure_ascii=False)
        text.encode("utf-8")
        assert re.sub(r'"[^"]*"|[^{}]', "", text).count("{" * 80) == 0
        for call in message.template.get("tool_calls", ()):
            assert isinstance(call["function"]["arguments"], dict) and call["type"]
    assert any(message.role == "assistant" and message.weight > 0 for message in row.messages)
    assert all(isinstance(tool, dict) for tool in row.tools)


ON = ("loss", "train", "training", "trainable")
LOSS = ("weight", "loss_weight")


def switches_are_fine(turn: dict[str, Any]) -> tuple[bool, bool]:
    """Return two flags: the turn's switches are readable; an assistant's turn is trained."""
    given = [turn[key] for key in LOSS if turn.get(key) is not None]
    if not all(map(is_number, given)) or len(set(given)) > 1:
        return False, False
    flags = [(key, turn[key]) for key in (*ON, "masked") if turn.get(key) is not None]
    if any(not isinstance(value, bool | int | float) or value not in (0, 1) for _, value in flags):
        return False, False
    states = [value > 0 for value in given] + [bool(v) != (key == "masked") for key, v in flags]
    return len(set(states)) <= 1 and turn.get("mask") is None, all(states)


def chat_is_fine(record: dict[str, Any], kind: str) -> bool | None:
    """Return True if a record of turns must be accepted.

    None for records that this function does not judge: calls, parts of a turn, history, switches of
    the row, JSON text.
    """
    turns = record.get(FIELDS[kind][0])
    if isinstance(turns, str) or any(record.get(key) for key in ("history", "only_last", "mask")):
        return None
    if not isinstance(turns, list) or not turns:
        return False
    if any(word in repr(turns) for word in ("call", "train_detail", "reasoning'}", "'type'")):
        return None
    fine = row_weight_is_fine(record.get("weight")) and system_is_fine(record)
    trained = []
    for turn in turns:
        if not isinstance(turn, dict):
            return False
        role, content = (turn.get(key) for key in TURN_KEYS[kind])
        fine &= isinstance(role, str) and role in NAMES
        if content == []:
            content = ""
        readable, on = switches_are_fine(turn)
        fine &= is_text(content) and readable
        fine &= all(turn.get(k) is None or is_text(turn[k]) for k in ("name", "reasoning_content"))
        if fine and role in ASSISTANT:
            trained.append(on)
            fine &= not on or bool((content or "").strip())
    first = turns[0].get(TURN_KEYS[kind][0])
    twice = fine and bool((record.get("system") or "").strip()) and first == "system"
    tools = any(record.get(key) for key in ("tools", "functions"))
    return fine and any(trained) and not twice and (None if tools else True)


def assert_every_key_is_accounted_for(
    record: dict[str, Any], kind: str, is_chat: bool, notes: RowNotes
) -> None:
    """No key with a value vanishes: it is read, or reported (law 9)."""
    read = READ[kind] | READ_OF_ALL | (READ_OF_CHATS if is_chat else set())
    wanted = {key for key, value in record.items() if value is not None and key not in read}
    read_of = {"prompt": READ_OF_NODES} if kind == "tree" else {}
    for name in {*READ[kind], "history"} - {"rejected", "message_tree_id"}:
        turns = record.get(name)
        if isinstance(turns, str):
            turns = as_list(turns) if is_chat else None
        if kind == "tree":
            turns = nodes_of(turns) if name == "prompt" else turns
        for turn in turns if isinstance(turns, list) else ():
            if isinstance(turn, dict):
                known = {"from", "value"} if "from" in turn else read_of.get(name, READ_OF_MESSAGES)
                known = known | READ_OF_MESSAGES if "from" in turn else known
                keys = [key for key, value in turn.items() if value is not None]
                wanted |= {f"{name}.{key}" for key in keys if key not in known}
    shown = {key.encode("utf-8", "backslashreplace").decode() for key in wanted}
    shown = {key if len(key) <= 120 else f"{key[:120]}..." for key in shown}
    assert set(notes.unused) >= shown


def as_list(text: str) -> Any:
    try:
        return json.loads(text) if text.lstrip()[:1] == "[" else None
    except (ValueError, RecursionError):
        return None


def nodes_of(node: Any) -> list[Any]:
    if not isinstance(node, dict):
        return []
    replies = node.get("replies")
    return [node, *(n for r in (replies if isinstance(replies, list) else []) for n in nodes_of(r))]


def read_any(record: dict[str, Any], kind: str) -> tuple[list[Row | Rejection], RowNotes]:
    """Return the expected result for one record of any kind."""
    notes = RowNotes()
    if kind != "tree":
        return [read_row("f:1", record, kind, notes=notes)], notes
    reader = RowReader(kind, notes=notes)
    rows: list[Row | Rejection] = []
    for tree in read_trees([("f:1", record)], None):
        rows += [tree] if isinstance(tree, Rejection) else reader.read_tree(tree)
    return rows, notes


def check(record: dict[str, Any], kind: str, seen: Counter[str]) -> None:
    before = repr(record)
    rows, notes = read_any(record, kind)
    assert repr(record) == before
    row = rows[0]
    if isinstance(row, Rejection):
        seen["rejected"] += 1
        assert row.row_id == "f:1" and len(rows) == 1
        assert KNOWN_REASON.fullmatch(row.reason), row.reason
        assert len(row.reason + row.detail) < 400
        (row.reason + row.detail).encode("utf-8")
        assert not notes.unused and not notes.noticed
    else:
        seen["accepted"] += 1
        assert 0 <= row.weight <= 10
        assert_every_key_is_accounted_for(record, kind, bool(row.messages), notes)
        if kind in ("tree", "preference") and row.messages:
            assert_trained_once([row for row in rows if isinstance(row, Row)], kind)
        elif row.messages:
            assert_messages_right(row, record, kind)
        else:
            assert_strings_right(row, record, kind)
    fine = None
    if kind in TURN_KEYS:
        fine = chat_is_fine(record, kind)
    elif kind != "tree" and not any(map(is_a_list, (record.get(n) for n in texts_of(kind)))):
        fine = strings_are_fine(record, kind)
    if fine is not None:
        seen["judged"] += 1
        assert isinstance(row, Row) == fine, row


def texts_of(kind: str) -> tuple[str, ...]:
    return (*FIELDS[kind], "prompt")


def is_a_list(value: Any) -> bool:
    """A conversation, or text that could be one."""
    return isinstance(value, list | dict) or (isinstance(value, str) and value.lstrip()[:1] == "[")


def assert_trained_once(rows: list[Row], kind: str) -> None:
    assert [row.row_id for row in rows] == ["f:1", *(f"f:1/{n}" for n in range(2, len(rows) + 1))]
    for row in rows:
        assert kind == "preference" or row.messages[-1].role == "assistant"
        assert kind == "preference" or row.messages[-1].weight == 1
        assert any(m.role == "assistant" and m.weight > 0 for m in row.messages)


# The tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIELDS)
def test_arbitrary_json_in_every_place(kind: str) -> None:
    seen: Counter[str] = Counter()

    @fuzz(250)
    @given(FUZZED[kind])
    def run(record: dict[str, Any]) -> None:
        check(record, kind, seen)

    run()
    assert seen.total() >= 250
    assert min(seen["accepted"], seen["rejected"]) >= 10, seen  # else nothing was tried
    assert kind == "tree" or seen["judged"] >= 10, seen


@pytest.mark.parametrize("kind", FIELDS)
def test_damaged_rows(kind: str) -> None:
    seen: Counter[str] = Counter()
    check(GOOD[kind], kind, seen)
    assert seen["accepted"] == 1

    @fuzz(250)
    @given(damaged(kind))
    def run(record: dict[str, Any]) -> None:
        check(record, kind, seen)

    run()
    assert seen.total() >= 250
    assert min(seen["accepted"], seen["rejected"]) >= 10, seen


def test_keys_and_columns() -> None:
    """Groups, times, mapped columns and kinds that were never there: a row or a reason."""
    seen: Counter[str] = Counter()
    path = st.sampled_from(["a", "b", "m.x", "m.x.y", "a.b", "..", "\ud800"])
    fields = st.sampled_from(
        ["prompt", "completion", "messages", "weight", "message.role", "tools"]
    )
    readings = st.builds(
        RowReading,
        columns=st.none() | st.dictionaries(fields, path, max_size=3),
        group_key=st.none() | path,
        time_key=st.none() | path,
    )
    inner = st.dictionaries(st.sampled_from(["x", "y"]), ANYTHING, max_size=2)
    extra = st.fixed_dictionaries({}, optional={"a": USUALLY_WORDS, "b": SCALAR, "m": inner})

    @fuzz(200)
    @given(st.sampled_from(SINGLE), extra, readings)
    def run(kind: str, more: dict[str, Any], reading: RowReading) -> None:
        row = read_row("f:1", GOOD[kind] | more, kind, reading)
        seen[type(row).__name__] += 1
        if isinstance(row, Rejection):
            assert KNOWN_REASON.fullmatch(row.reason), row.reason
        else:
            assert (row.group is None) == (reading.group_key is None)
            assert (row.time is None) == (reading.time_key is None)
            assert isinstance(row.time, str) or row.time is None or math.isfinite(row.time)
            f"{row.group}{row.time}".encode()

    run()
    assert min(seen["Row"], seen["Rejection"]) >= 10, seen


def test_auto_decides_or_explains() -> None:
    seen: Counter[str] = Counter()
    kinds = (damaged(kind) for kind in SINGLE)
    records = st.one_of(*kinds, st.dictionaries(TEXT, JSON, max_size=3))
    sample = st.lists(records | st.just(Rejection("f:1", "malformed JSON")), max_size=4)

    @fuzz(150)
    @given(sample, st.booleans())
    def run(sample: list, alike: bool) -> None:
        sample = sample[:1] * 3 if alike else sample
        try:
            decision = decide_format(sample, PLAIN_READING, SourceSpec())
        except DataError as error:
            seen["refused"] += 1
            assert "dataset.format=auto cannot decide" in str(error)
            return
        seen["decided"] += 1
        fields = FIELDS[decision.kind]
        fitting = [r for r in sample if isinstance(r, dict) and all(f in r for f in fields)]
        assert decision.why.startswith(f"{len(fitting)} of the first {len(sample)} rows")

    run()
    assert min(seen["refused"], seen["decided"]) >= 20, seen


def test_damaged_bytes(tmp_path: Path) -> None:
    """Lines cut, bytes overwritten or put in: the stream goes on, and no line is without result."""
    path = tmp_path / "rows.jsonl"
    source = SourceSpec(file_dataset_path=str(path))
    seen: Counter[str] = Counter()
    accident = st.tuples(
        st.floats(0, 1),
        st.sampled_from(["cut", "overwrite", "insert"]),
        st.sampled_from([b"\xff", b"\xc3", b"\n", b"\x00", b'"', b"}", b"\xef\xbb\xbf", b"[" * 9]),
    )

    @fuzz(200)
    @given(
        st.sampled_from(SINGLE).flatmap(
            lambda kind: st.tuples(
                st.just(kind), st.lists(damaged(kind) | st.just(GOOD[kind]), min_size=1, max_size=6)
            )
        ),
        st.lists(accident, max_size=4),
    )
    def run(rows: tuple[Format, list[dict[str, Any]]], accidents: list[tuple]) -> None:
        kind, records = rows
        data = "\n".join(map(json.dumps, records)).encode()
        for place, action, piece in accidents:
            at = int(place * len(data))
            rest = {"cut": at + 40, "overwrite": at + len(piece), "insert": at}[action]
            data = data[:at] + (b"" if action == "cut" else piece) + data[rest:]
        path.write_bytes(data)
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        wanted = {f"rows.jsonl:{n}": raw for n, raw in enumerate(lines, 1) if raw.strip()}
        if not wanted:
            with pytest.raises(DataError, match="is empty"):
                open_rows(source, RowReading(format=kind))
            return
        _, stream = open_rows(source, RowReading(format=kind))
        results = list(stream)
        assert [row.row_id for row in results] == list(wanted)
        for row in results:
            try:
                record = json.loads(wanted[row.row_id].decode("utf-8"))
            except (ValueError, RecursionError):
                record = None
            if isinstance(record, dict):
                seen["read"] += 1
                assert repr(row) == repr(read_row(row.row_id, record, kind))
            else:
                seen["broken"] += 1
                assert isinstance(row, Rejection) and row.reason

    run()
    assert min(seen["read"], seen["broken"]) >= 50, seen
