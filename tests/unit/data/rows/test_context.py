"""`system` and `history` in rows of every kind, as turns and as text in front of a prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import Row, RowReading, load_rows, read_row
from torchprime.data.rows.row import PLAIN_READING
from torchprime.data.shared.notes import RowNotes

USER = {"role": "user", "content": "u"}
BOT = {"role": "assistant", "content": "b"}
SYSTEM = {"role": "system", "content": "Be kind."}
PC = {"prompt": "p", "completion": "c"}
QA = {"question": "q", "answer": "a"}
ALPACA = {"instruction": "i", "input": "n", "output": "o"}
AS_MESSAGES = RowReading(as_messages=True)
# Rows that become conversations, and how.
CHATS: list[tuple[str, dict[str, Any], RowReading]] = [
    ("messages", {"messages": [USER, BOT]}, RowReading()),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "b"}]},
        RowReading(),
    ),
    ("prompt_completion", {"prompt": [USER], "completion": [BOT]}, RowReading()),
    ("prompt_completion", {"prompt": "u", "completion": "b"}, AS_MESSAGES),
    ("question_answer", {"question": "u", "answer": "b"}, AS_MESSAGES),
    ("alpaca", {"instruction": "u", "output": "b"}, AS_MESSAGES),
    ("preference", {"prompt": "u", "chosen": "b", "rejected": "x"}, AS_MESSAGES),
    ("preference", {"prompt": [USER], "chosen": [BOT], "rejected": [USER]}, RowReading()),
]
PAIRS = [["u1", "b1"], ["u2", "b2"]]
HISTORY = [
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "b1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "b2"},
]
SHAREGPT_HISTORY = [
    {"from": {"user": "human", "assistant": "gpt"}[turn["role"]], "value": turn["content"]}
    for turn in HISTORY
]


def accepted(record: dict[str, Any], kind: str, reading: RowReading = PLAIN_READING) -> Row:
    notes = RowNotes()
    row = read_row("f:1", record, kind, reading, notes=notes)
    assert isinstance(row, Row), row
    assert not notes.unused
    return row


def refused(record: dict[str, Any], kind: str, reading: RowReading = PLAIN_READING) -> str:
    row = read_row("f:1", record, kind, reading)
    assert isinstance(row, Rejection), row
    return row.reason


def templates(row: Row) -> list[dict[str, Any]]:
    return [dict(message.template) for message in row.messages]


@pytest.mark.parametrize(("kind", "record", "reading"), CHATS)
def test_conversations_begin_with_system_and_history(
    kind: str, record: dict, reading: RowReading
) -> None:
    assert templates(accepted(record, kind, reading)) == [USER, BOT]
    for none in (None, "", " \n"):
        given = record | {"system": none, "history": none}
        assert accepted(given, kind, reading) == accepted(record, kind, reading)
    row = accepted(record | {"system": "Be kind."}, kind, reading)
    assert templates(row) == [SYSTEM, USER, BOT]
    assert (row.prompt, row.completion) == ("", "")
    forms = (PAIRS, HISTORY, SHAREGPT_HISTORY, json.dumps(PAIRS), json.dumps(HISTORY))
    for history in forms:
        row = accepted(record | {"system": "Be kind.", "history": history}, kind, reading)
        assert templates(row) == [SYSTEM, *HISTORY, USER, BOT]
        # The assistant's turns of the history carry loss, as with LLaMA-Factory.
        assert [m.weight for m in row.messages if m.role == "assistant"] == [1.0, 1.0, 1.0]
    assert accepted(record | {"history": []}, kind, reading) == accepted(record, kind, reading)


def test_history_stands_behind_the_rows_own_system_turn() -> None:
    record = {"messages": [SYSTEM, USER, BOT], "history": PAIRS}
    assert templates(accepted(record, "messages")) == [SYSTEM, *HISTORY, USER, BOT]
    assert refused(record | {"history": [SYSTEM, *HISTORY]}, "messages") == (
        "system is given twice: as a field and as the first turn"
    )
    own = {"messages": [USER, BOT], "history": [SYSTEM, *HISTORY]}
    assert templates(accepted(own, "messages")) == [SYSTEM, *HISTORY, USER, BOT]


def test_history_keeps_weights_and_calls() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "train": False}
    history = [USER, call, {"role": "tool", "content": "1"}, BOT | {"weight": 2}]
    row = accepted({"messages": [USER, BOT], "history": history}, "messages")
    assert [message.weight for message in row.messages] == [1, 0, 1, 2, 1, 1]
    assert "tool_calls" in row.messages[1].template


def test_plain_prompts() -> None:
    system = {"system": "Be kind."}
    assert accepted(PC | system, "prompt_completion").prompt == "Be kind.\n\np"
    question = "Question:\n{}\n\n\nAnswer:\n"
    both = system | {"history": PAIRS}
    assert accepted(QA | both, "question_answer") == Row(
        "f:1",
        "question_answer",
        f"Be kind.\n\n{question.format('u1')}b1\n\n{question.format('u2')}b2\n\n"
        + question.format("q"),
        "a",
    )
    assert accepted(PC | {"history": PAIRS}, "prompt_completion").prompt == "u1b1\n\nu2b2\n\np"
    assert accepted(PC | {"history": HISTORY}, "prompt_completion").prompt == "u1b1\n\nu2b2\n\np"
    preference = {"prompt": "p", "chosen": "c", "rejected": "r"}
    row = accepted(preference | both, "preference")
    assert (row.prompt, row.completion) == ("Be kind.\n\nu1b1\n\nu2b2\n\np", "c")


def test_the_system_prompt_takes_the_place_of_alpacas_opening() -> None:
    plain = accepted(ALPACA, "alpaca").prompt
    opening, frame = plain.split("\n\n", 1)
    assert opening.startswith("Below is an instruction") and opening.endswith("the request.")
    assert accepted(ALPACA | {"system": "Be kind."}, "alpaca").prompt == f"Be kind.\n\n{frame}"
    history = "### Instruction:\n{u}\n\n### Response:{b}\n\n".format
    assert accepted(ALPACA | {"history": PAIRS}, "alpaca").prompt == (
        f"{opening}\n\n{history(u='u1', b='b1')}{history(u='u2', b='b2')}{frame}"
    )


def test_texts_take_a_system_prompt_as_context() -> None:
    given = {"text": "once upon", "system": "Be kind."}
    assert accepted(given, "text") == Row("f:1", "text", "Be kind.\n\n", "once upon")
    inside = {"text": "<s>Be kind.</s> once upon", "system": "Be kind."}
    assert accepted(inside, "text").prompt == ""
    assert accepted(given | {"history": []}, "text").prompt == "Be kind.\n\n"
    assert refused({"text": "t", "history": PAIRS}, "text") == (
        "field history is not supported in text rows"
    )


HISTORY_REASON = "history is not a list of pairs or of messages"


@pytest.mark.parametrize(
    ("history", "reason"),
    [
        *(
            (bad, HISTORY_REASON)
            for bad in (3, {}, "x", "[[", ["u", "b"], [["u"]], [["u", "b", "c"]])
        ),
        *(
            (bad, HISTORY_REASON)
            for bad in ([["u", None]], [["u", "b"], USER], [{"u": 1}, ["u", "b"]])
        ),
        ([{"u": "b"}], "message has no role"),
        ([USER, {"role": "narrator", "content": "x"}], "unknown role"),
        ([["u", ""]], "message content is empty"),
        ([["\ud800", "b"]], "message is not valid Unicode"),
    ],
)
def test_rejected_history(history: object, reason: str) -> None:
    for kind, record, reading in CHATS:
        assert refused(record | {"history": history}, kind, reading) == reason
    for kind, record in (("question_answer", QA), ("text", {"text": "t"})):
        assert refused(record | {"history": history}, kind) == reason


def test_plain_prompts_take_pairs_only() -> None:
    call = {"role": "assistant", "content": "x", "tool_calls": [{"name": "f"}]}
    for history in ([USER], [BOT, USER], [SYSTEM, USER, BOT], [USER, call]):
        assert refused(QA | {"history": history}, "question_answer") == HISTORY_REASON
        accepted({"messages": [USER, BOT], "history": history}, "messages")


def test_rejected_system_prompts() -> None:
    for kind, record, reading in CHATS:
        assert refused(record | {"system": 3}, kind, reading) == "field system is not a string"
        own = json.loads(
            json.dumps(record).replace('"user"', '"system"').replace("human", "system")
        )
        if reading is not AS_MESSAGES and kind != "preference":
            assert refused(own | {"system": "x"}, kind) == (
                "system is given twice: as a field and as the first turn"
            )
    assert refused({"text": "t", "system": ["x"]}, "text") == "field system is not a string"


def test_users_cases(shared_dir: Path) -> None:
    """Rows as they were reported to other trainers."""

    def first(name: str, reading: RowReading) -> Row:
        path = shared_dir / "cases/data" / name
        return load_rows(SourceSpec(file_dataset_path=str(path)), 1, reading=reading)[0]

    row = first("system_column/bedrock.jsonl", RowReading())
    assert row.messages[0].template == {
        "role": "system",
        "content": "Answer as a lighthouse keeper.",
    }
    columns = {"system": "system_prompt", "question": "question", "answer": "response"}
    row = first("alpaca/orca.jsonl", RowReading(columns=columns))
    assert row.prompt.startswith("Be brief.\n\nQuestion:\nWhy is the sea salty?")
    row = first("alpaca/orca.jsonl", RowReading(columns=columns, as_messages=True))
    assert [message.role for message in row.messages] == ["system", "user", "assistant"]
