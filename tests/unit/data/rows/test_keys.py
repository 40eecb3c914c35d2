"""Keys that nothing reads: each is reported, and columns that look like input are a warning."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.formats import FormatDecision
from torchprime.data.rows.read import Row, RowReading, open_rows, read_row
from torchprime.data.rows.row import PLAIN_READING
from torchprime.data.shared.notes import RowNotes

USER = {"role": "user", "content": "u"}
BOT = {"role": "assistant", "content": "b"}
QA = {"question": "q", "answer": "a"}


def unused(
    record: dict[str, Any], kind: str, reading: RowReading = PLAIN_READING
) -> dict[str, str]:
    """The example of each key that is reported."""
    notes = RowNotes()
    row = read_row("f:1", record, kind, reading, notes=notes)
    assert isinstance(row, Row), row
    return {path: noted.example for path, noted in notes.unused.items()}


# Records -----------------------------------------------------------------------------------------


def test_keys_of_a_record() -> None:
    record = QA | {"id": 3, "context": "c", "none": None, "tools": "[]", "input": "x"}
    assert unused(record, "question_answer") == {
        "id": "3",
        "context": "'c'",
        "tools": "'[]'",  # of conversations only
        "input": "'x'",  # of Alpaca's rows only
    }
    assert unused(record, "question_answer", RowReading(as_messages=True)) == {
        "id": "3",
        "context": "'c'",
        "input": "'x'",
    }
    chat = {"messages": [USER, BOT], "prompt": "u", "lang": ""}
    assert unused(chat, "messages") == {"prompt": "'u'", "lang": ""}


def test_keys_that_the_config_names_are_used() -> None:
    record = QA | {"id": 3, "thread": "t", "at": 5, "weight": 2}
    keys = RowReading(id_key="id", group_key="thread", time_key="at")
    assert unused(record, "question_answer", keys) == {}
    columns = {"question": "Body", "answer": "Answer"}
    other = {"Body": "q", "Answer": "a", "answer": "not this one"}
    assert unused(other, "question_answer", RowReading(columns=columns)) == {
        "answer": "'not this one'"
    }
    # A field that rows of this kind do not have.
    columns = {"question": "Body", "answer": "Answer", "input": "Context"}
    record = {"Body": "q", "Answer": "a", "Context": "c"}
    assert unused(record, "question_answer", RowReading(columns=columns)) == {"Context": "'c'"}
    # A column of our own name that is mapped to such a field: it is no system prompt then.
    moved = RowReading(columns={"input": "system"})
    assert unused(QA | {"system": "s"}, "question_answer", moved) == {"system": "'s'"}
    columns = {"instruction": "Body", "output": "Answer", "input": "Context"}
    assert unused(record, "alpaca", RowReading(columns=columns)) == {}


def test_dotted_columns_use_what_they_name() -> None:
    meta = {"text": "a", "by": "x", "deep": {"t": "g", "u": 1, "n": None}, "none": None}
    record = {"question": "q", "meta": meta, "rest": {"a": 1}}
    reading = RowReading(columns={"answer": "meta.text"}, group_key="meta.deep.t")
    assert unused(record, "question_answer", reading) == {
        "meta.by": "'x'",
        "meta.deep.u": "1",
        "rest": "an object",
    }
    whole = RowReading(columns={"answer": "a.b"})  # a column with a dot in its own name
    record = {"question": "q", "a.b": "x", "a": {"b": "y"}}
    assert unused(record, "question_answer", whole) == {"a": "an object"}


def test_rejected_rows_are_not_counted(write_rows: Callable[..., Path]) -> None:
    rows = [QA | {"x": 1}, {"question": "q", "x": 2}, QA | {"x": 3, "y": 4}]
    notes = RowNotes()
    _, stream = open_rows(
        SourceSpec(file_dataset_path=str(write_rows(*rows))), RowReading(), notes=notes
    )
    assert [isinstance(row, Rejection) for row in stream] == [False, True, False]
    found = {path: (n.count, n.row_id, n.example) for path, n in notes.unused.items()}
    assert found == {"x": (2, "rows.jsonl:1", "1"), "y": (1, "rows.jsonl:3", "4")}


def test_keys_that_are_data_have_an_end() -> None:
    notes = RowNotes()
    for n in range(1500):
        read_row(f"f:{n}", QA | {f"user {n}": 1, "id": n}, "question_answer", notes=notes)
    read_row("f:x", QA | {"\ud800" * 500: 1}, "question_answer", notes=notes)
    assert len(notes.unused) == 1001
    assert (notes.unused["id"].count, notes.unused["other keys"].count) == (1500, 502)
    notes = RowNotes()
    for _ in range(2):
        read_row("f:1", QA | {"\ud800" * 500: 1}, "question_answer", notes=notes)
    ((path, noted),) = notes.unused.items()
    assert noted.count == 2 and len(path) < 130
    path.encode("utf-8")


# Messages ----------------------------------------------------------------------------------------


def test_keys_of_messages_and_of_their_parts() -> None:
    part = {"type": "text", "text": "b", "cache_control": {"x": 1}, "index": None}
    turns = [
        USER | {"lang": "en", "id": None},
        BOT | {"content": [part, part], "refusal": "no"},
        USER | {"lang": "de"},
        BOT,
    ]
    assert unused({"messages": turns}, "messages") == {
        "messages.lang": "'en'",
        "messages.refusal": "'no'",
        "messages.content.cache_control": "an object",
    }
    sharegpt = [{"from": "human", "value": "u", "lang": "en"}, {"from": "gpt", "value": "b"}]
    assert unused({"conversations": sharegpt}, "sharegpt") == {"conversations.lang": "'en'"}
    prompt = {"prompt": [USER | {"a": 1}], "completion": [BOT | {"b": 2}]}
    assert unused(prompt, "prompt_completion") == {"prompt.a": "1", "completion.b": "2"}
    history = {"messages": [USER, BOT], "history": [USER | {"a": 1}, BOT]}
    assert unused(history, "messages") == {"history.a": "1"}


def test_messages_under_other_names() -> None:
    columns = {"messages": "log.turns", "message.role": "who", "message.content": "says"}
    turns = [{"who": "human", "says": "u", "content": "x"}, {"who": "model", "says": "b"}]
    record = {"log": {"turns": turns, "by": "me"}}
    assert unused(record, "messages", RowReading(columns=columns)) == {
        "log.turns.content": "'x'",
        "log.by": "'me'",
    }


# Columns that look like input --------------------------------------------------------------------

LONG = "In the harbour of Skerry the tide comes in twice a day, and number {} is the highest."


def decided(write_rows: Callable[..., Path], *rows: dict, **reading: Any) -> FormatDecision:
    source = SourceSpec(file_dataset_path=str(write_rows(*rows)))
    return open_rows(source, RowReading(**reading))[0]


@pytest.mark.parametrize(
    ("record", "kind"),
    [
        (QA, "question_answer"),
        ({"prompt": "p", "completion": "c"}, "prompt_completion"),
        ({"instruction": "i", "output": "o"}, "alpaca"),
        ({"messages": [USER, BOT]}, "messages"),
    ],
)
def test_a_column_that_looks_like_input(
    write_rows: Callable[..., Path], record: dict, kind: str
) -> None:
    rows = [record | {"context": LONG.format(n), "id": n} for n in range(5)]
    decision = decided(write_rows, *rows)
    assert decision.kind == kind
    assert decision.like_input == ("context",)
    assert list(decision.unused) == ["context", "id"]
    assert decision.unused["context"].startswith("'In the harbour of Skerry")


HASH = "0123456789abcdef" * 4


@pytest.mark.parametrize(
    "column",
    [
        lambda n: "short words " + str(n),
        lambda n: LONG,  # the same in each row: no input of this one
        lambda n: LONG.format(n % 2),
        lambda n: HASH + str(n),
        lambda n: f"https://example.com/a/very/long/address/of/a/page/number/{n}",
        lambda n: None if n % 3 else LONG.format(n),
        lambda n: [LONG.format(n)],
        lambda n: n,
    ],
)
def test_columns_that_do_not(write_rows: Callable[..., Path], column: Callable) -> None:
    rows = [QA | {"context": column(n)} for n in range(8)]
    assert decided(write_rows, *rows).like_input == ()


def test_other_columns_that_do_not(write_rows: Callable[..., Path]) -> None:
    texts = [LONG.format(n) for n in range(8)]
    beside = [{"text": "t", "context": text} for text in texts]
    assert decided(write_rows, *beside).like_input == ()
    in_the_row = [{"messages": [USER | {"content": t}, BOT], "prompt": t} for t in texts]
    decision = decided(write_rows, *in_the_row)
    assert (decision.like_input, list(decision.unused)) == ((), ["prompt"])
    mapped = [QA | {"instruction": "i", "output": "o", "context": t} for t in texts]
    columns = {"input": "context"}
    decision = decided(write_rows, *mapped, format="alpaca", columns=columns)
    assert (decision.like_input, list(decision.unused)) == ((), ["question", "answer"])
    chinese = [QA | {"context": f"港口每天涨潮两次，{n}号是最高的。" * 3} for n in range(8)]
    assert decided(write_rows, *chinese).like_input == ("context",)
    assert decided(write_rows, QA | {"context": texts[0]}).like_input == ()  # one row shows nothing
