"""The three kinds of record, how auto decides between them, and why a record is rejected."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from torchprime.data.rows import Rejection, Row, decide_format, load_rows, open_rows, read_row
from torchprime.data.sources import SourceSpec
from torchprime.errors import DataError

PC = {"prompt": "p", "completion": "c"}
QA = {"question": "q", "answer": "a"}
TEXT = {"text": "t"}


def test_the_three_kinds() -> None:
    assert read_row("f:1", PC, "prompt_completion") == Row("f:1", "prompt_completion", "p", "c")
    assert read_row("f:1", TEXT, "text") == Row("f:1", "text", "", "t")
    question = "How {many}?"
    row = read_row("f:1", {"question": question, "answer": "4"}, "question_answer")
    prompt = "Question:\nHow {many}?\n\n\nAnswer:\n"
    assert row == Row("f:1", "question_answer", prompt, "4")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "q"}, "field answer is missing"),
        ({"question": "q", "answer": None}, "field answer is null"),
        ({"question": "q", "answer": 4}, "field answer is not a string"),
        ({"question": "q", "answer": " \n"}, "field answer is empty"),
        ({"question": "", "answer": "a"}, "field question is empty"),
        ({"question": "\ud83d", "answer": "a"}, "field question is not valid Unicode"),
    ],
)
def test_rejections(record: dict, reason: str) -> None:
    rejected = read_row("f:9", record, "question_answer")
    assert isinstance(rejected, Rejection)
    assert (rejected.row_id, rejected.reason) == ("f:9", reason)


def test_empty_prompt_is_a_row_and_empty_completion_is_not() -> None:
    assert isinstance(read_row("f:1", {"prompt": "", "completion": "c"}, "prompt_completion"), Row)
    rejected = read_row("f:1", {"prompt": "p", "completion": ""}, "prompt_completion")
    assert rejected == Rejection("f:1", "field completion is empty")


@pytest.mark.parametrize(
    ("sample", "kind"),
    [
        ([PC, PC], "prompt_completion"),
        ([QA | {"id": 3}], "question_answer"),
        ([TEXT, {"other": 1}], "text"),
    ],
)
def test_auto(sample: list[dict], kind: str) -> None:
    decision = decide_format(sample, "auto")
    assert decision.kind == kind
    assert f"of the first {len(sample)} rows have" in decision.why


@pytest.mark.parametrize(
    ("sample", "counts"),
    [
        ([PC, QA, QA], "question_answer: 2 rows, prompt_completion: 1 rows"),
        ([PC | TEXT] * 3, "prompt_completion + text: 3 rows"),
        ([TEXT, QA, {}], "question_answer: 1 rows, none: 1 rows"),
    ],
)
def test_auto_refuses_a_mixture(sample: list[dict], counts: str) -> None:
    with pytest.raises(DataError) as caught:
        decide_format(sample, "auto")
    assert counts in str(caught.value)
    assert "Set dataset.format to one of" in str(caught.value)


def test_auto_with_no_known_fields_names_what_it_found() -> None:
    with pytest.raises(DataError) as caught:
        decide_format([{"Body": "b", "Answer": 1}], "auto", "eval")
    assert "eval source" in str(caught.value)
    assert "Found Answer, Body; expected {prompt, completion}" in str(caught.value)


def test_requested_kind_is_taken_and_unknown_refused() -> None:
    assert decide_format([PC | TEXT], "text").kind == "text"
    with pytest.raises(DataError, match="dataset.format=alpaca is not known"):
        decide_format([PC], "alpaca")


def test_rows_beyond_the_sample_that_differ_are_rejected(write_rows: Callable[..., Path]) -> None:
    path = write_rows(*[PC] * 150, QA)
    decision, rows = open_rows(SourceSpec(file_dataset_path=str(path)), "auto")
    results = list(rows)
    assert decision.kind == "prompt_completion"
    assert [row.row_id for row in results] == [f"rows.jsonl:{n}" for n in range(1, 152)]
    assert [row.row_id for row in results if isinstance(row, Rejection)] == ["rows.jsonl:151"]


def test_load_rows_takes_the_first_usable(write_rows: Callable[..., Path]) -> None:
    path = write_rows(PC, PC | {"prompt": None}, PC | {"prompt": "third"}, PC)
    rows = load_rows(SourceSpec(file_dataset_path=str(path)), 2)
    assert [row.prompt for row in rows] == ["p", "third"]
