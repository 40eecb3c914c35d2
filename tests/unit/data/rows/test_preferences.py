"""Preference rows: the chosen answer is trained, what it shares with the other is context."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.formats import decide_format
from torchprime.data.rows.read import Row, RowReading, open_rows, read_row
from torchprime.data.rows.row import PLAIN_READING
from torchprime.data.shared.notes import RowNotes
from torchprime.errors import DataError

NOTICE = "preference rows: chosen is trained, rejected is not used"


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def read(record: dict[str, Any], reading: RowReading = PLAIN_READING) -> Row | Rejection:
    return read_row("f:1", record, "preference", reading)


def turns(row: Row | Rejection) -> list[tuple[str, float]]:
    """Return each turn's text and weight; a user's turn has no weight."""
    assert isinstance(row, Row), row
    assert (row.kind, row.prompt, row.completion) == ("preference", "", "")
    return [(m.content, m.weight if m.role == "assistant" else -1) for m in row.messages]


def test_texts() -> None:
    notes = RowNotes()
    record = {"prompt": "p", "chosen": "c", "rejected": "r", "score": 3}
    row = read_row("f:1", record, "preference", notes=notes)
    assert row == Row("f:1", "preference", "p", "c")
    assert list(notes.unused) == ["score"]
    assert {text: noted.count for text, noted in notes.noticed.items()} == {NOTICE: 1}
    as_turns = read(record, RowReading(as_messages=True))
    assert turns(as_turns) == [("p", -1), ("c", 1.0)]


U1, B1, U2, B2, B3 = user("u1"), bot("b1"), user("u2"), bot("b2"), bot("b3")


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        # Both hold the whole conversation.
        ({"chosen": [U1, B1], "rejected": [U1, B2]}, [("u1", -1), ("b1", 1)]),
        (
            {"chosen": [U1, B1, U2, B2], "rejected": [U1, B1, U2, B3]},
            [("u1", -1), ("b1", 0), ("u2", -1), ("b2", 1)],
        ),
        (
            {"chosen": [U1, B1, U2, B2], "rejected": [U1, B3]},
            [("u1", -1), ("b1", 1), ("u2", -1), ("b2", 1)],
        ),
        # The prompt apart, as turns.
        (
            {"prompt": [U1, B1, U2], "chosen": [B2], "rejected": [B3]},
            [("u1", -1), ("b1", 0), ("u2", -1), ("b2", 1)],
        ),
        # The prompt apart and in the conversation.
        (
            {"prompt": [U1, B1, U2], "chosen": [U1, B1, U2, B2], "rejected": [B3]},
            [("u1", -1), ("b1", 0), ("u2", -1), ("b2", 1)],
        ),
        (
            {"prompt": [U1], "chosen": [B1], "rejected": [U1, B3]},
            [("u1", -1), ("b1", 1)],
        ),
        # As a text.
        ({"prompt": "u1", "chosen": [U1, B1], "rejected": [U1, B2]}, [("u1", -1), ("b1", 1)]),
        ({"prompt": "u1", "chosen": [B1], "rejected": [B2]}, [("u1", -1), ("b1", 1)]),
        ({"prompt": " ", "chosen": [U1, B1], "rejected": [B2]}, [("u1", -1), ("b1", 1)]),
        # One message without a list (LLaMA-Factory), and lists as JSON text.
        ({"prompt": [U1], "chosen": B1, "rejected": B2}, [("u1", -1), ("b1", 1)]),
        (
            {"chosen": json.dumps([U1, B1]), "rejected": json.dumps([U1, B2])},
            [("u1", -1), ("b1", 1)],
        ),
        # The last turn is trained even where the rejected one is no other.
        ({"chosen": [U1, B1], "rejected": [U1, B1]}, [("u1", -1), ("b1", 1)]),
        ({"chosen": [U1, B1], "rejected": None}, [("u1", -1), ("b1", 1)]),
        ({"chosen": [U1, B1], "rejected": [3]}, [("u1", -1), ("b1", 1)]),
    ],
)
def test_conversations(record: dict, wanted: list) -> None:
    assert turns(read(record)) == wanted


def test_keys_of_a_prompt_that_stands_twice_are_reported() -> None:
    notes = RowNotes()
    record = {
        "prompt": [U1 | {"lang": "en"}],
        "chosen": [U1, B1 | {"by": "x"}],
        "rejected": [U1, B2],
    }
    row = read_row("f:1", record, "preference", notes=notes)
    assert turns(row) == [("u1", -1), ("b1", 1)]
    assert list(notes.unused) == ["prompt.lang", "chosen.by"]


def test_sharegpt_turns_and_calls() -> None:
    human, call = (
        {"from": "human", "value": "u"},
        {"from": "function_call", "value": '{"name": "f"}'},
    )
    record = {"prompt": [human], "chosen": [call], "rejected": [{"from": "gpt", "value": "b"}]}
    row = read(record | {"tools": [{"name": "f"}]})
    assert isinstance(row, Row) and len(row.tools) == 1
    assert row.messages[1].template["tool_calls"][0]["function"]["name"] == "f"
    other = {"from": "function_call", "value": '{"name": "g"}'}
    both = {"chosen": [human, call, {"from": "observation", "value": "1"}, call]}
    rejected = {"rejected": [human, call, {"from": "observation", "value": "1"}, other]}
    weights = [m.weight for m in read(both | rejected).messages]  # type: ignore[union-attr]
    assert weights == [0, 0, 0, 1]


def test_dialogues_as_text() -> None:
    """HH-RLHF's form: the dialogue up to the last "Assistant:" that both have is the prompt."""
    before = "\n\nHuman: hi\n\nAssistant: ho\n\nHuman: how?\n\nAssistant:"
    record = {"chosen": f"{before} I say this.", "rejected": f"{before} I say that."}
    row = read(record)
    assert row == Row("f:1", "preference", before, " I say this.")
    assert turns(read(record, RowReading(as_messages=True))) == [
        *(("hi", -1), ("ho", 0), ("how?", -1), ("I say this.", 1)),
    ]
    longer = record | {"chosen": f"{before} I say.\n\nHuman: go on\n\nAssistant: Well."}
    differs = "chosen does not continue the prompt"
    assert read(longer) == Rejection("f:1", differs, "they differ in more than the last answer")
    other = record | {"rejected": "\n\nHuman: other\n\nAssistant: x"}
    assert isinstance(rejected := read(other), Rejection) and rejected.reason == differs
    same = read({"chosen": record["chosen"], "rejected": record["chosen"]})
    assert same == Row("f:1", "preference", before, " I say this.")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"chosen": "c", "rejected": "r"}, "field prompt is missing"),
        ({"prompt": None, "chosen": "c", "rejected": "r"}, "field prompt is null"),
        ({"prompt": 3, "chosen": "c", "rejected": "r"}, "field prompt is not a string"),
        ({"prompt": 3, "chosen": [B1], "rejected": "r"}, "field prompt is not a string"),
        ({"prompt": "p", "rejected": "r"}, "field chosen is missing"),
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "field chosen is null"),
        ({"prompt": "p", "chosen": "", "rejected": "r"}, "field chosen is empty"),
        ({"prompt": "p", "chosen": [], "rejected": "r"}, "field chosen is empty"),
        ({"prompt": "p", "chosen": 3, "rejected": "r"}, "field chosen is not a string"),
        (
            {"prompt": "p", "chosen": [U1, B1], "rejected": "r"},
            "chosen does not continue the prompt",
        ),
        ({"chosen": [U1], "rejected": "r"}, "no assistant turn to learn from"),
    ],
)
def test_rejected(record: dict, reason: str) -> None:
    row = read(record)
    assert isinstance(row, Rejection) and row.reason == reason


def test_auto_never_chooses_it_and_says_how(write_rows: Callable[..., Path]) -> None:
    for record in (
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"chosen": [B1], "rejected": []},
    ):
        with pytest.raises(DataError, match="Set dataset.format=preference to train the chosen"):
            decide_format([record], PLAIN_READING, SourceSpec())
    beside = {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "r"}
    assert decide_format([beside], PLAIN_READING, SourceSpec()).kind == "prompt_completion"
    path = write_rows({"prompt": "p", "chosen": "c", "rejected": "r"})
    decision, rows = open_rows(SourceSpec(str(path)), RowReading("preference"))
    assert decision.kind == "preference"
    assert list(rows) == [Row("rows.jsonl:1", "preference", "p", "c")]
