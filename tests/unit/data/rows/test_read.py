"""The kinds of record, how auto decides between them, and why a record is rejected."""

from __future__ import annotations

import datetime
import json
import math
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import torchprime.data
from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.messages.read import Message
from torchprime.data.rows.formats import FormatDecision, decide_format
from torchprime.data.rows.read import SAMPLE_ROWS, Row, RowReading, load_rows, open_rows, read_row
from torchprime.data.shared import fields
from torchprime.data.shared.fields import REASONS
from torchprime.data.shared.notes import RowNotes
from torchprime.errors import DataError

PC = {"prompt": "p", "completion": "c"}
QA = {"question": "q", "answer": "a"}
TEXT = {"text": "t"}
ALPACA = {"instruction": "i", "input": "", "output": "o"}
USER = {"role": "user", "content": "u"}
BOT = {"role": "assistant", "content": "b"}
TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = {"messages": [USER, BOT]}
SHAREGPT = {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "b"}]}
PLAIN = RowReading()
KINDS = {
    "prompt_completion": PC,
    "question_answer": QA,
    "alpaca": ALPACA,
    "messages": CHAT,
    "sharegpt": SHAREGPT,
    "text": TEXT,
    "preference": {"prompt": "p", "chosen": "c", "rejected": "r"},
}


def decided(
    sample: list,
    format: Any = "auto",
    columns: dict | None = None,
    section: str = "dataset",
) -> FormatDecision:
    return decide_format(sample, RowReading(format, columns), SourceSpec(section=section))


def accepted(record: dict[str, Any], kind: str, reading: RowReading = PLAIN) -> Row:
    row = read_row("f:1", record, kind, reading)
    assert isinstance(row, Row), row
    return row


def refused(record: dict[str, Any], kind: str, reading: RowReading = PLAIN) -> Rejection:
    row = read_row("f:9", record, kind, reading)
    assert isinstance(row, Rejection), row
    assert row.row_id == "f:9"
    return row


def templates(row: Row) -> list[dict[str, Any]]:
    return [dict(message.template) for message in row.messages]


def weights(row: Row) -> list[float]:
    return [message.weight for message in row.messages]


# Strings -----------------------------------------------------------------------------------------


def test_prompt_completion_question_answer_and_text() -> None:
    assert read_row("f:1", PC, "prompt_completion") == Row("f:1", "prompt_completion", "p", "c")
    assert read_row("f:1", TEXT, "text") == Row("f:1", "text", "", "t")
    question = "How {many}?"
    row = read_row("f:1", {"question": question, "answer": "4"}, "question_answer")
    prompt = "Question:\nHow {many}?\n\n\nAnswer:\n"
    assert row == Row("f:1", "question_answer", prompt, "4")


def test_alpaca_has_the_two_forms_of_the_original() -> None:
    plain = (
        "Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd {input}\n\n### Response:"
    )
    with_input = (
        "Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {input}\n\n### Input:\n1 {instruction}\n\n### Response:"
    )
    record = {"instruction": "Add {input}", "output": " 3 "}
    for empty in ({}, {"input": None}, {"input": ""}, {"input": " \n"}):
        assert accepted(record | empty, "alpaca") == Row("f:1", "alpaca", plain, " 3 ")
    row = accepted(record | {"input": "1 {instruction}"}, "alpaca")
    assert (row.prompt, row.completion) == (with_input, " 3 ")
    assert accepted(record | {"history": [], "system": ""}, "alpaca").prompt == plain


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "q"}, "field answer is missing"),
        ({"question": "q", "answer": None}, "field answer is null"),
        ({"question": "q", "answer": 4}, "field answer is not a string"),
        ({"question": "q", "answer": " \n"}, "field answer is empty"),
        ({"question": "", "answer": "a"}, "field question is empty"),
        ({"question": "\ud83d", "answer": "a"}, "field question is not valid Unicode"),
        ({"question": ["q"], "answer": "a"}, "field question is not a string"),
    ],
)
def test_rejected_strings(record: dict, reason: str) -> None:
    assert refused(record, "question_answer").reason == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"input": 3}, "field input is not a string"),
        ({"output": ""}, "field output is empty"),
        ({"instruction": " ", "input": "x"}, "field instruction is empty"),
    ],
)
def test_rejected_alpaca(change: dict, reason: str) -> None:
    assert refused(ALPACA | change, "alpaca").reason == reason


def test_empty_prompt_is_a_row_and_empty_completion_is_not() -> None:
    assert accepted({"prompt": "", "completion": "c"}, "prompt_completion").prompt == ""
    assert refused({"prompt": "p", "completion": ""}, "prompt_completion") == Rejection(
        "f:9", "field completion is empty"
    )


# Prompts and completions that are messages -------------------------------------------------------


def test_conversational_prompt_and_completion() -> None:
    record = {
        "prompt": [USER, BOT | {"content": ""}, USER],
        "completion": [BOT | {"weight": 3}, USER, BOT],
        "tools": [TOOL],
    }
    row = accepted(record, "prompt_completion")
    assert (row.kind, row.prompt, row.completion) == ("messages", "", "")
    assert weights(row) == [0.0, 0.0, 0.0, 3.0, 1.0, 1.0]
    assert [message.content for message in row.messages] == ["u", "", "u", "b", "u", "b"]
    assert row.tools == (TOOL,)
    assert weights(accepted({"prompt": [], "completion": [BOT]}, "prompt_completion")) == [1.0]


@pytest.mark.parametrize(
    ("prompt", "completion", "reason"),
    [
        ("p", [BOT], "only one of prompt and completion is a list of messages"),
        ([USER], "c", "only one of prompt and completion is a list of messages"),
        ([USER], None, "field completion is null"),
        ([USER], [], "field completion is empty"),
        ([USER], [USER], "no assistant turn to learn from"),
        ([USER, BOT], [USER], "every assistant turn has weight 0"),
        ([USER | {"weight": 11}], [BOT], "message weight is not a number from 0 to 10"),
    ],
)
def test_rejected_conversational_prompts(prompt: object, completion: object, reason: str) -> None:
    record = {"prompt": prompt, "completion": completion}
    assert refused(record, "prompt_completion").reason == reason


@pytest.mark.parametrize(
    ("kind", "record", "asked", "answer"),
    [
        ("prompt_completion", PC, "p", "c"),
        ("question_answer", QA, "q", "a"),  # without the frame of a prompt: the template has one
        ("alpaca", ALPACA, "i", "o"),
        ("alpaca", ALPACA | {"input": "n"}, "i\n\nn", "o"),
    ],
)
def test_prompts_as_messages(kind: str, record: dict, asked: str, answer: str) -> None:
    row = accepted(record | {"weight": 2}, kind, RowReading(as_messages=True))
    assert templates(row) == [
        {"role": "user", "content": asked},
        {"role": "assistant", "content": answer},
    ]
    assert (row.kind, row.weight, weights(row)) == (kind, 2.0, [1.0, 1.0])
    assert (row.prompt, row.completion) == ("", "")


def test_as_messages_leaves_the_others_as_they_are_and_needs_a_prompt() -> None:
    reading = RowReading(as_messages=True)
    for kind in ("messages", "sharegpt", "text"):
        assert accepted(KINDS[kind], kind, reading) == accepted(KINDS[kind], kind)
    empty = refused(PC | {"prompt": " "}, "prompt_completion", reading)
    assert empty.reason == "field prompt is empty"


THINK = RowReading(answer_form="think_answer")


@pytest.mark.parametrize("kind", ["prompt_completion", "question_answer", "alpaca"])
def test_answers_as_think_and_answer(kind: str) -> None:
    field = {"prompt_completion": "completion", "question_answer": "answer", "alpaca": "output"}
    record = KINDS[kind] | {field[kind]: " She has 3 <<1+2=3>>3.\nSo:\n#### $1,003 \n"}
    row = accepted(record, kind, THINK)
    assert row.completion == (
        "<think>\nShe has 3 <<1+2=3>>3.\nSo:\n</think>\n<answer>\n$1,003\n</answer>"
    )
    assert row.prompt == accepted(record, kind).prompt
    both = RowReading(answer_form="think_answer", as_messages=True)
    assert templates(accepted(record, kind, both))[1]["content"] == row.completion


@pytest.mark.parametrize(
    "answer",
    [
        *("only reasoning", "#### 7", "reasoning\n####", "reasoning\n#### \n", "a\n#### 1\n#### 2"),
        *("a\n#### 1\nthat is all", "<think>a</think>\n#### 1", "a\n#### <answer>1</answer>"),
    ],
)
def test_an_answer_without_a_final_line_is_rejected(answer: str) -> None:
    row = refused(QA | {"answer": answer}, "question_answer", THINK)
    assert row.reason == "answer is not reasoning and one line of #### and a value"
    assert row.detail


def test_only_rows_with_one_answer_have_a_form(tmp_path: Path) -> None:
    turns = {"prompt": [USER], "completion": [BOT]}
    assert "#### and a value" in refused(turns, "prompt_completion", THINK).reason
    path = tmp_path / "rows.jsonl"
    for kind in ("messages", "sharegpt", "text"):
        path.write_text(json.dumps(KINDS[kind]) + "\n")
        with pytest.raises(DataError, match=f"answer_form=think_answer is for .* are {kind}"):
            open_rows(SourceSpec(str(path)), THINK)


def test_all_of_gsm8k_takes_the_form(shared_dir: Path) -> None:
    """Every row there is, and graders agree with the row's own value."""
    for name, count in (("train", 7473), ("test", 1319)):
        _, rows = open_rows(SourceSpec(str(shared_dir / f"data/gsm8k/{name}.jsonl")), THINK)
        read = list(rows)
        assert len(read) == count and all(isinstance(row, Row) for row in read)
        _, plain = open_rows(SourceSpec(str(shared_dir / f"data/gsm8k/{name}.jsonl")), PLAIN)
        for row, other in zip(read, plain, strict=True):
            assert isinstance(row, Row) and isinstance(other, Row)
            thought, value = other.completion.split("####")
            assert row.completion.split("\n")[-2] == value.strip()
            assert row.completion.startswith(f"<think>\n{thought.strip()}\n</think>\n<answer>\n")


# Whole rows --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_row_weight(kind: str) -> None:
    for given, weight in ((None, 1.0), (0, 0.0), (2.5, 2.5), (10, 10.0), ("2.5", 2.5)):
        assert accepted(KINDS[kind] | {"weight": given}, kind).weight == weight
    for bad in (-1, 10.01, float("inf"), float("nan"), True, "x", "", "nan", [1], "11"):
        rejected = refused(KINDS[kind] | {"weight": bad}, kind)
        assert rejected.reason == "row weight is not a number from 0 to 10"


def test_columns_under_other_names() -> None:
    reading = RowReading(columns={"question": "Body", "answer": "meta.solution.text"})
    record = {"Body": "q", "meta": {"solution": {"text": "a"}}, "answer": "not this one"}
    row = accepted(record, "question_answer", reading)
    assert row == accepted(QA, "question_answer")
    # A column that has dots in its own name, and two fields that change places.
    dotted = RowReading(columns={"text": "a.b"})
    assert accepted({"a.b": "x", "a": {"b": "y"}}, "text", dotted).completion == "x"
    swapped = RowReading(columns={"prompt": "completion", "completion": "prompt"})
    row = accepted(PC, "prompt_completion", swapped)
    assert (row.prompt, row.completion) == ("c", "p")


def test_columns_inside_messages() -> None:
    reading = RowReading(
        columns={"messages": "log.turns", "message.role": "who", "message.content": "says"}
    )
    turns = [{"who": "human", "says": "u"}, {"who": "model", "says": "b"}]
    assert templates(accepted({"log": {"turns": turns}}, "messages", reading)) == [USER, BOT]
    as_sharegpt = RowReading(columns={**(reading.columns or {}), "conversations": "log.turns"})
    turns[1]["who"] = "chatgpt"
    assert templates(accepted({"log": {"turns": turns}}, "sharegpt", as_sharegpt)) == [USER, BOT]


def test_a_mapped_column_that_is_not_there() -> None:
    reading = RowReading(columns={"question": "body"})
    rejected = refused({"Body": "q", "question": "x", "answer": "a"}, "question_answer", reading)
    assert rejected.reason == "field question is missing"
    assert rejected.detail == "column body; found Body, answer"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"Question": "Body"}, r"no field Question, .* Did you mean question\?"),
        ({"Body": "question"}, r"Our field comes first: dataset.columns=\{question: Body\}"),
        ({"question": 3}, "expected the name of a column"),
        ({"question": ""}, "expected the name of a column"),
    ],
)
def test_unknown_columns(columns: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        decided([QA], "question_answer", columns=columns)
    with pytest.raises(DataError, match=message):  # before anything is read
        open_rows(SourceSpec(file_dataset_path="no/such.jsonl"), RowReading(columns=columns))


def test_group_and_time() -> None:
    reading = RowReading(group_key="meta.thread", time_key="at")

    def read(group: object, time: object) -> Row:
        return accepted(QA | {"meta": {"thread": group}, "at": time}, "question_answer", reading)

    row = read("t1", 5)
    assert (row.group, row.time) == ("t1", 5.0)
    assert read(7, 5).group == "7"
    for given, time in (
        (" 2024-02-29 ", "2024-02-29"),
        ("2024-02-29 10:00", "2024-02-29T10:00:00"),
        ("2024-02-29T10:00:00Z", "2024-02-29T10:00:00+00:00"),
        ("2024-02-29T10:00:00.1+0200", "2024-02-29T10:00:00.100000+02:00"),
        ("2024-02-29T10:00:00,123456789-05:30", "2024-02-29T10:00:00.123456-05:30"),
        (datetime.datetime(2024, 2, 29, 10), "2024-02-29T10:00:00"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        ("1700000000.5", 1700000000.5),
    ):
        assert read("x", given).time == time


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"at": 1}, "group_key thread is missing"),
        ({"at": 1, "thread": None}, "group_key thread is missing"),
        ({"at": 1, "thread": " "}, "group_key thread is missing"),
        ({"at": 1, "thread": float("nan")}, "group_key thread is missing"),
        ({"at": 1, "thread": ["x"]}, "group_key thread is not a string or number"),
        ({"at": 1, "thread": "\ud800"}, "group_key thread is not a string or number"),
        ({"thread": "x"}, "time_key at is missing"),
        *(
            ({"thread": "x", "at": bad}, "time_key at is not a number or an ISO date")
            for bad in (True, [], float("nan"), float("inf"), "soon", "2023-02-29", "29.02.2024")
        ),
        *(
            ({"thread": "x", "at": bad}, "time_key at is not a number or an ISO date")
            for bad in ("2024-02-29T25:00", "2024-02-29T10:00+29:00", "2024-02-29T")
        ),
    ],
)
def test_rejected_groups_and_times(fields: dict, reason: str) -> None:
    reading = RowReading(group_key="thread", time_key="at")
    assert refused(QA | fields, "question_answer", reading).reason == reason


@pytest.mark.parametrize(
    ("value", "weight"), [(2, 4.0), (0.25, 0.5), ("1.5", 3.0), (0, 0.0), (1e6, 2e6)]
)
def test_a_weight_key_is_a_factor_beside_the_rows_weight(value: object, weight: float) -> None:
    reading = RowReading(weight_key="meta.importance")
    record = QA | {"weight": 2, "meta": {"importance": value}}
    assert accepted(record, "question_answer", reading).weight == weight


@pytest.mark.parametrize(
    "bad", [-1, math.nan, math.inf, -math.inf, "high", "1e3", True, [1], 1e-7, 2e6, "nan"]
)
def test_a_bad_weight_of_a_weight_key_is_rejected(bad: object) -> None:
    reading = RowReading(weight_key="w")
    found = refused(QA | {"w": bad}, "question_answer", reading)
    assert found.reason == "weight_key w is not 0 or a number from 1e-6 to 1e6" and found.detail
    for missing in (QA, QA | {"w": None}):
        found = refused(missing, "question_answer", reading)
        assert found.reason == "weight_key w is missing"


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_row_takes_a_weight_key(kind: str) -> None:
    notes, reading = RowNotes(), RowReading(weight_key="w")
    row = read_row("f:1", KINDS[kind] | {"w": 3}, kind, reading, notes=notes)
    assert isinstance(row, Row) and row.weight == 3
    assert "w" not in notes.to_dict()["unused_keys"]


def test_ids_may_occur_once(write_rows: Callable[..., Path]) -> None:
    ids = ["a", "b", "a", 1, "1", None, [2], "c"]
    rows = [QA | {"id": value} for value in ids]
    rows.insert(7, QA | {"id": "c", "answer": ""})  # rejected, so it claims no id
    source = SourceSpec(file_dataset_path=str(write_rows(*rows, QA)))
    _, results = open_rows(source, RowReading(id_key="id"))
    got = [r if isinstance(r, Rejection) else r.row_id for r in results]
    at = "rows.jsonl:{}".format
    assert got == [
        at(1),
        at(2),
        Rejection(at(3), "duplicated id", f"'a' is the id of {at(1)} already"),
        at(4),
        Rejection(at(5), "duplicated id", f"'1' is the id of {at(4)} already"),
        Rejection(at(6), "id_key id is missing"),
        Rejection(at(7), "id_key id is not a string or number", "a list"),
        Rejection(at(8), "field answer is empty"),
        at(9),
        Rejection(at(10), "id_key id is missing"),
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_details_are_short_and_printable(kind: str) -> None:
    big = "\ud800" * 10_000
    role = {"role": big, "from": big, "content": "x", "value": "x"}
    for record in ({big: 1}, {"messages": [role], "conversations": [role]}):
        detail = refused(record, kind).detail
        assert len(detail) < 300
        detail.encode("utf-8")


# Kinds of rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "kind", "why"),
    [
        ([PC, PC], "prompt_completion", "2 of the first 2 rows have prompt and completion"),
        ([QA | {"id": 3}], "question_answer", "1 of the first 1 rows have question and answer"),
        ([TEXT, {"other": 1}], "text", "1 of the first 2 rows have text"),
        ([ALPACA, {}], "alpaca", "1 of the first 2 rows have instruction and output"),
        ([CHAT | {"prompt": "u"}], "messages", "1 of the first 1 rows have messages"),
        ([SHAREGPT], "sharegpt", "1 of the first 1 rows have conversations"),
        ([{"prompt": [USER], "completion": [BOT]}], "prompt_completion", "1 of the first 1"),
        # Nulls that Arrow adds do not make a mixture; a row of nulls alone is named.
        ([PC | {"text": None}, PC], "prompt_completion", "2 of the first 2"),
        ([{"text": None}], "text", "1 of the first 1"),
        ([PC, Rejection("f:2", "malformed JSON")], "prompt_completion", "1 of the first 2 rows"),
    ],
)
def test_auto(sample: list, kind: str, why: str) -> None:
    decision = decided(sample)
    assert decision.kind == kind
    assert decision.why.startswith(why)


def test_auto_prefers_a_list_of_messages_over_strings_and_says_so() -> None:
    decision = decided([CHAT | PC, CHAT, CHAT | PC])
    assert decision.kind == "messages"
    assert decision.why == (
        "3 of the first 3 rows have messages, a list of messages, which is preferred over the "
        "strings beside it: prompt and completion (2 rows)"
    )


@pytest.mark.parametrize(
    ("sample", "counts"),
    [
        ([PC, QA, QA], "question_answer: 2 rows, prompt_completion: 1 rows"),
        ([PC | TEXT] * 3, "prompt_completion + text: 3 rows"),
        ([TEXT, QA, {}], "question_answer: 1 rows, none: 1 rows"),
        ([CHAT | TEXT], "messages + text: 1 rows"),
        ([CHAT | SHAREGPT], "messages + sharegpt: 1 rows"),
        ([ALPACA | TEXT], "alpaca + text: 1 rows"),
        ([PC | {"messages": "m"}], "prompt_completion + messages: 1 rows"),
        ([CHAT | {"prompt": [USER], "completion": [BOT]}], "prompt_completion + messages: 1"),
        ([CHAT | PC, PC], "messages: 1 rows, prompt_completion: 1 rows"),
    ],
)
def test_auto_refuses_a_mixture(sample: list[dict], counts: str) -> None:
    with pytest.raises(DataError) as caught:
        decided(sample)
    assert counts in str(caught.value)
    assert "Set dataset.format to one of" in str(caught.value)


def test_auto_with_no_known_fields_names_what_it_found() -> None:
    with pytest.raises(DataError) as caught:
        decided([{"Body": "b", "Answer": 1}], columns={"answer": "solution"}, section="eval")
    assert "eval source" in str(caught.value)
    assert "Found Answer, Body; expected {prompt, completion}" in str(caught.value)
    assert "No row has answer (column solution) of dataset.columns" in str(caught.value)


def test_auto_where_nothing_can_be_read() -> None:
    broken = [Rejection(f"f:{n}", "malformed JSON", "cut") for n in (1, 2)]
    with pytest.raises(DataError, match=r"none of the first 2 rows .* \(malformed JSON: 2; .* f:1"):
        decided(broken)
    assert decided(broken, "text").kind == "text"


def test_auto_decides_after_columns_are_named() -> None:
    record = {"Body": "q", "Answer": "a"}
    columns = {"question": "Body", "answer": "Answer"}
    assert decided([record], columns=columns).kind == "question_answer"


def test_requested_kind_is_taken() -> None:
    for kind in KINDS:
        assert decided([PC | TEXT], kind).kind == kind


# Files -------------------------------------------------------------------------------------------


def test_rows_beyond_the_sample_that_differ_are_rejected(write_rows: Callable[..., Path]) -> None:
    path = write_rows(*[PC] * 150, QA)
    source = SourceSpec(file_dataset_path=str(path), name="main")
    decision, rows = open_rows(source, RowReading())
    results = list(rows)
    assert decision.kind == "prompt_completion"
    at = "main/rows.jsonl:{}".format
    assert [row.row_id for row in results] == [at(n) for n in range(1, 152)]
    assert [row.row_id for row in results if isinstance(row, Rejection)] == [at(151)]
    assert {row.source for row in results if isinstance(row, Row)} == {"main"}


def test_unreadable_lines_come_through_in_their_place(tmp_path: Path) -> None:
    good = json.dumps(PC).encode()
    lines = [good, good[:9], b'{"prompt": "\xff"}', b"[1]"] + [good] * SAMPLE_ROWS + [good[:-1]]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    decision, rows = open_rows(
        SourceSpec(file_dataset_path=str(tmp_path / "rows.jsonl")), RowReading()
    )
    results = list(rows)
    assert decision.why.startswith(f"{SAMPLE_ROWS - 3} of the first {SAMPLE_ROWS} rows have")
    assert [row.row_id for row in results] == [f"rows.jsonl:{n}" for n in range(1, len(lines) + 1)]
    bad = [n for n, row in enumerate(results) if isinstance(row, Rejection)]
    assert bad == [1, 2, 3, len(lines) - 1]


def test_load_rows_takes_the_first_usable(write_rows: Callable[..., Path]) -> None:
    path = write_rows(PC, PC | {"prompt": None}, PC | {"prompt": "third"}, PC)
    rows = load_rows(SourceSpec(file_dataset_path=str(path)), 2)
    assert [row.prompt for row in rows] == ["p", "third"]
    reading = RowReading(format="text", columns={"text": "completion"})
    (row,) = load_rows(SourceSpec(file_dataset_path=str(path)), 1, reading=reading)
    assert row == Row("rows.jsonl:1", "text", "", "c")


def test_a_row_of_ten_megabytes(write_rows: Callable[..., Path]) -> None:
    text = "x" * 10_000_000
    path = write_rows({"messages": [USER, BOT | {"content": text}]})
    (row,) = load_rows(SourceSpec(file_dataset_path=str(path)), 1)
    assert row.messages[1] == Message({"role": "assistant", "content": text})


def test_reasons_are_all_listed() -> None:
    """Documents and reports rely on the list: nothing else is given, and each entry is used."""
    code = ""
    for path in sorted(Path(torchprime.data.__path__[0]).rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if path.name == "advice.py" or "\nfrom " not in source:
            continue
        body = source[source.rindex("\nfrom ") :]  # an import is no use of a name
        code += body[body.index("\n\n") :]
    code = code.replace(code[code.index("REASONS = (") : code.index("MISSING =")], "")
    names = {name for name in re.findall(r"\b[A-Z][A-Z_]+\b", code) if hasattr(fields, name)}
    constants = {name: getattr(fields, name) for name in names}
    used = {name for name in names if len(re.findall(rf"\b{name}\b", code)) > 1}
    assert {str(constants[name]) for name in used} >= set(REASONS)
    raised = set(re.findall(r"Unusable\((?:row\.row_id, )?([A-Z_]{3,})", code))
    assert len(raised) > 35
    assert {constants[name] for name in raised} <= set(REASONS)


REAL = [
    # file, columns, kind, accepted, rejected by reason
    ("gsm8k/test.jsonl", None, "question_answer", 1319, {}),
    ("instruction_data_rasbt.json", None, "alpaca", 1100, {}),
    ("llamafactory_identity.json", None, "alpaca", 91, {}),
    ("litgpt_dolly.json", {"input": "context", "output": "response"}, "alpaca", 12, {}),
    ("fastchat_dummy_conversation.json", None, "sharegpt", 500, {}),
    ("llamafactory_glaive_toolcall_en_demo.json", None, "sharegpt", 300, {}),
    ("axolotl_conversation.json", None, "sharegpt", 1, {}),
    (
        "axolotl_conversation.missingturns.json",
        None,
        "sharegpt",
        0,
        {"message content is empty": 1},
    ),
    ("torchtune_chat_tiny.json", None, "sharegpt", 1, {}),
    ("tinker_conversations.jsonl", None, "messages", 128, {}),
    ("llamafactory_v1_sft_demo.jsonl", None, "messages", 500, {}),
    ("sgd_dev_messages.jsonl", None, "messages", 780, {}),
    ("mlx_superbowl_all.jsonl", None, "prompt_completion", 1944, {}),
    ("tinystories_qa.jsonl", None, "prompt_completion", 225, {}),
    ("svamp.json", {"question": "Question", "answer": "Equation"}, "question_answer", 1000, {}),
    (
        "svamp.json",
        {"question": "Body", "answer": "Answer"},  # a number; how to write it is not ours to guess
        "question_answer",
        0,
        {"field answer is not a string": 1000},
    ),
]


@pytest.mark.parametrize(("name", "columns", "kind", "usable", "rejected"), REAL)
def test_real_data(
    shared_dir: Path, name: str, columns: dict | None, kind: str, usable: int, rejected: dict
) -> None:
    source = SourceSpec(file_dataset_path=str(shared_dir / "data" / name))
    decision, rows = open_rows(source, RowReading(columns=columns))
    results = list(rows)
    assert decision.kind == kind
    assert Counter(row.reason for row in results if isinstance(row, Rejection)) == rejected
    assert sum(isinstance(row, Row) for row in results) == usable


def test_real_pirate_conversations(shared_dir: Path, write_rows: Callable[..., Path]) -> None:
    """One file with two splits, which sources refuse to choose between."""
    file = shared_dir / "data" / "pirate_conversations.json"
    splits = json.loads(file.read_text(encoding="utf-8"))
    path = write_rows(*splits["train"])
    columns = {"prompt": "user", "completion": "assistant"}
    decision, rows = open_rows(SourceSpec(file_dataset_path=str(path)), RowReading(columns=columns))
    got = [(row.prompt, row.completion) for row in rows if isinstance(row, Row)]
    assert decision.kind == "prompt_completion"
    assert got == [(turn["user"], turn["assistant"]) for turn in splits["train"]]
