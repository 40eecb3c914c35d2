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
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchprime.data.fields import REASONS
from torchprime.data.records import Rejection
from torchprime.data.row_format import FIELDS, decide_format
from torchprime.data.rows import Row, RowReading, open_rows, read_row
from torchprime.data.sources import SourceSpec
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
        suppress_health_check=list(HealthCheck),
    )


# What is generated -------------------------------------------------------------------------------

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


def some_of(required: dict[str, Any], optional: dict[str, Any]) -> st.SearchStrategy:
    return st.fixed_dictionaries(required, optional=optional)


ARGUMENTS = st.sampled_from([{}, {"a": 1}, '{"a": [1]}', DEEP])
CALL = some_of({"name": USUALLY_WORDS, "arguments": usually(ARGUMENTS, TEXT)}, {})
CALLS = usually(st.lists(usually(CALL | st.fixed_dictionaries({"function": CALL})), max_size=2))
EXTRAS = {
    "weight": usually(st.sampled_from([0, 1, 2.5, 10]), NUMBER),
    "loss_weight": usually(st.sampled_from([None, None, None, 1])),
    "train": usually(st.sampled_from([None, True, False])),
    "name": USUALLY_WORDS,
    "reasoning_content": USUALLY_WORDS,
}
PARTS = st.lists(
    usually(st.fixed_dictionaries({"type": st.just("text"), "text": WORDS})), max_size=2
)
ROLE = usually(
    st.sampled_from(["system", "user", "human", "assistant", "assistant", "gpt", "tool"])
)
SAID = {"role": ROLE, "content": usually(WORDS | PARTS, TEXT)}
TURN = some_of(SAID, {}) | some_of(SAID, EXTRAS) | some_of(SAID, {"tool_calls": CALLS})
SHAREGPT_TURN = some_of(
    {
        "from": usually(st.sampled_from(["system", "human", "gpt", "observation", "chatgpt"])),
        "value": USUALLY_WORDS,
    },
    EXTRAS,
)
FUNCTION_CALL = st.fixed_dictionaries(
    {"from": st.just("function_call"), "value": CALL.map(json.dumps) | TEXT | CALLS}
)
WEIGHT = {"weight": usually(st.sampled_from([0, 1, 2.5, 10]), NUMBER)}
TOOLS = {"tools": usually(st.sampled_from([[], "[]", [{"name": "f"}], '[{"name": "f"}]']))}
TURNS = usually(st.lists(usually(TURN), max_size=4))
FUZZED: dict[str, st.SearchStrategy] = {
    "prompt_completion": some_of({"prompt": USUALLY_WORDS, "completion": USUALLY_WORDS}, WEIGHT)
    | some_of({"prompt": TURNS, "completion": TURNS}, WEIGHT | TOOLS),
    "question_answer": some_of({"question": USUALLY_WORDS, "answer": USUALLY_WORDS}, WEIGHT),
    "alpaca": some_of(
        {"instruction": USUALLY_WORDS, "output": USUALLY_WORDS},
        {"input": USUALLY_WORDS, "history": ANYTHING, "system": SCALAR} | WEIGHT,
    ),
    "messages": some_of({"messages": TURNS}, WEIGHT | TOOLS),
    "sharegpt": some_of(
        {"conversations": usually(st.lists(usually(SHAREGPT_TURN | FUNCTION_CALL), max_size=4))},
        WEIGHT | TOOLS | {"system": USUALLY_WORDS},
    ),
    "text": some_of({"text": USUALLY_WORDS | TEXT}, WEIGHT),
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
}


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


# What is right -----------------------------------------------------------------------------------


TURN_KEYS = {"messages": ("role", "content"), "sharegpt": ("from", "value")}
ROLE_NAMES = {
    "messages": {"system", "developer", "user", "human", "assistant", "gpt", "model", "tool"}
    | {"function"},
    "sharegpt": {"system", "human", "user", "gpt", "assistant", "model", "chatgpt", "tool"}
    | {"observation", "function_response"},
}


def is_text(value: Any) -> bool:
    return isinstance(value, str) and value == value.encode("utf-8", "ignore").decode("utf-8")


def is_number(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 10


def row_weight_is_fine(value: Any) -> bool:
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", value):
        value = float(value)  # all that a CSV file can say
    return value is None or is_number(value)


def strings_are_fine(record: dict[str, Any], kind: str) -> bool:
    """Whether a record of strings is to be accepted: exactly when this says so."""
    may_be_empty = {"prompt", "input"}
    names = [*FIELDS[kind], *(["input"] if record.get("input") is not None else [])]
    for name in names if kind == "alpaca" else FIELDS[kind]:
        value = record.get(name)
        if not is_text(value) or not (value.strip() or name in may_be_empty):
            return False
    if kind == "alpaca" and (record.get("history") or record.get("system")):
        return False
    return row_weight_is_fine(record.get("weight"))


def assert_strings_right(row: Row, record: dict[str, Any], kind: str) -> None:
    *context, answer = (record[name] for name in FIELDS[kind])
    assert row.completion == answer
    assert all(text in row.prompt for text in context)
    assert row.kind != "prompt_completion" or row.prompt == record["prompt"]
    assert not row.messages and not row.tools


def assert_messages_right(row: Row, record: dict[str, Any]) -> None:
    turns = record.get("messages", record.get("conversations"))
    if row.kind == "messages" and "completion" in record:
        turns = record["prompt"] + record["completion"]
    names = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "observation": "tool"}
    names |= {"function_call": "assistant"}
    messages = row.messages[len(row.messages) - len(turns) :]
    assert len(row.messages) - len(turns) == (row.kind == "sharegpt" and bool(system_of(record)))
    context = record["prompt"] if "completion" in record else []
    for number, (message, turn) in enumerate(zip(messages, turns, strict=True)):
        role, content = (turn.get("role"), turn.get("content"))
        if row.kind == "sharegpt":
            role, content = turn["from"], turn["value"]
        assert message.role == names.get(role, role)
        assert message.role in ("system", "developer", "user", "assistant", "tool")
        if isinstance(content, list) and role != "function_call":
            content = "".join(part.get("text") or part.get("value") or "" for part in content)
        got = message.template["content"]
        assert got == (None if role == "function_call" else content)
        assert isinstance(got, str) or message.template["tool_calls"]
        is_off = turn.get("train") is False or 0 in (turn.get("weight"), turn.get("loss_weight"))
        assert (message.weight == 0) == (is_off or number < len(context))
        text = json.dumps(message.template, ensure_ascii=False)
        text.encode("utf-8")
        assert re.sub(r'"[^"]*"|[^{}]', "", text).count("{" * 80) == 0
    assert any(message.role == "assistant" and message.weight > 0 for message in messages)
    assert all(isinstance(tool, dict) for tool in row.tools)


def system_of(record: dict[str, Any]) -> str:
    return (record.get("system") or "").strip()


def chat_is_fine(record: dict[str, Any], kind: str) -> bool | None:
    """Whether a record of turns is to be accepted; None for the few with tools: not said here."""
    turns, system = record.get(FIELDS[kind][0]), record.get("system")
    if not isinstance(turns, list) or not turns:
        return False
    if "function_call" in repr(turns) or "tool_calls" in repr(turns):
        return None
    fine = row_weight_is_fine(record.get("weight"))
    fine &= kind == "messages" or system is None or is_text(system)
    trained = []
    for turn in turns:
        if not isinstance(turn, dict):
            return False
        role, content = (turn.get(key) for key in TURN_KEYS[kind])
        fine &= isinstance(role, str) and role in ROLE_NAMES[kind]
        if isinstance(content, list):
            if not all(isinstance(p, dict) and p.get("type") == "text" for p in content):
                return False
            texts = [p.get("text") if is_text(p.get("text")) else p.get("value") for p in content]
            content = "".join(texts) if all(map(is_text, texts)) else None
        given = [turn[key] for key in ("weight", "loss_weight") if turn.get(key) is not None]
        fine &= all(map(is_number, given)) and (len(given) < 2 or given[0] == given[1])
        fine &= is_text(content) and any(turn.get("train") is x for x in (None, True, False))
        fine &= all(turn.get(k) is None or is_text(turn[k]) for k in ("name", "reasoning_content"))
        if fine and role in ("assistant", "gpt", "chatgpt", "model"):
            trained.append(turn.get("train") is not False and 0 not in given)
            fine &= not trained[-1] or bool(content.strip())
    twice = kind == "sharegpt" and fine and bool(system_of(record)) and turns[0]["from"] == "system"
    return fine and any(trained) and not twice and (None if "tools" in record else True)


def check(record: dict[str, Any], kind: str, seen: Counter[str]) -> None:
    before = repr(record)
    row = read_row("f:1", record, kind)
    assert repr(record) == before
    if isinstance(row, Rejection):
        seen["rejected"] += 1
        assert row.row_id == "f:1"
        assert KNOWN_REASON.fullmatch(row.reason), row.reason
        assert len(row.reason + row.detail) < 400
        (row.reason + row.detail).encode("utf-8")
    else:
        seen["accepted"] += 1
        assert 0 <= row.weight <= 10
        if row.messages:
            assert_messages_right(row, record)
        else:
            assert_strings_right(row, record, kind)
    conversational = kind == "prompt_completion" and any(
        isinstance(record.get(name), list) for name in FIELDS[kind]
    )
    if kind not in ("messages", "sharegpt") and not conversational:
        assert isinstance(row, Row) == strings_are_fine(record, kind)
    elif not conversational and (fine := chat_is_fine(record, kind)) is not None:
        seen["judged"] += 1
        assert isinstance(row, Row) == fine, row


# The tests ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FIELDS)
def test_arbitrary_json_in_every_place(kind: str) -> None:
    seen: Counter[str] = Counter()

    @fuzz(400)
    @given(FUZZED[kind])
    def run(record: dict[str, Any]) -> None:
        check(record, kind, seen)

    run()
    assert seen.total() >= 400
    assert min(seen["accepted"], seen["rejected"]) >= 10, seen  # else nothing was tried


@pytest.mark.parametrize("kind", FIELDS)
def test_damaged_rows(kind: str) -> None:
    seen: Counter[str] = Counter()
    check(GOOD[kind], kind, seen)
    assert seen["accepted"] == 1

    @fuzz(400)
    @given(damaged(kind))
    def run(record: dict[str, Any]) -> None:
        check(record, kind, seen)

    run()
    assert seen.total() >= 400
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

    @fuzz(300)
    @given(st.sampled_from(sorted(GOOD)), extra, readings)
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
    records = st.one_of(*(damaged(kind) for kind in GOOD), st.dictionaries(TEXT, JSON, max_size=3))
    sample = st.lists(records | st.just(Rejection("f:1", "malformed JSON")), max_size=4)

    @fuzz(200)
    @given(sample, st.booleans())
    def run(sample: list, alike: bool) -> None:
        sample = sample[:1] * 3 if alike else sample
        try:
            decision = decide_format(sample, "auto")
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
        st.sampled_from(sorted(GOOD)).flatmap(
            lambda kind: st.tuples(
                st.just(kind), st.lists(damaged(kind) | st.just(GOOD[kind]), min_size=1, max_size=6)
            )
        ),
        st.lists(accident, max_size=4),
    )
    def run(rows: tuple[str, list[dict[str, Any]]], accidents: list[tuple]) -> None:
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
