"""What a row means: six kinds of record become a prompt and a completion, or messages.

    prompt_completion  {prompt, completion}           strings as they are; or two lists of messages
    question_answer    {question, answer}             the question inside QUESTION_PROMPT
    alpaca             {instruction, input?, output}  inside the prompts of the original Alpaca
    messages           {messages, tools?}             [{role, content, tool_calls?, weight?, ...}]
    sharegpt           {conversations, tools?, system?}   [{from, value}], made messages
    text               {text}                         no prompt; everything is completion

`auto` decides once, on the first rows, and refuses to guess between kinds; `columns` says which
columns of the source the fields are in (row_format.py). Messages come out in one form whatever they
came in (messages.py). A record that can't be used is a `Rejection`, to be counted, not an
exception: its reason is one of REASONS (fields.py), its detail this record's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from torchprime.data.answer_form import (
    AS_IS,
    KINDS_WITH_ANSWERS,
    THINK_ANSWER,
    think_answer,
)
from torchprime.data.fields import (
    ALL_OFF,
    BAD_ID,
    DUPLICATED_ID,
    FIELD_EMPTY,
    FIELD_NOT_LIST,
    FIELD_UNSUPPORTED,
    MIXED_FORMS,
    NO_ASSISTANT,
    NO_ID,
    ROW_WEIGHT,
    TWO_SYSTEMS,
    Unusable,
    decimal,
    field_of,
    group_of,
    scalar_of,
    show,
    string_of,
    time_of,
    type_name,
    weight_of,
)
from torchprime.data.messages import (
    SHAREGPT_ROLES,
    Message,
    message_keys,
    read_message,
    read_tools,
)
from torchprime.data.notes import RowNotes
from torchprime.data.records import Rejection
from torchprime.data.row_format import (
    QUESTION_PROMPT,
    FormatDecision,
    check_columns,
    decide_format,
    rename,
)
from torchprime.data.sources import SourceSpec, read_rows
from torchprime.errors import DataError

SAMPLE_ROWS = 100

# The wording is Alpaca's own: models and servers of that form know no other.
ALPACA_PROMPT = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
ALPACA_PROMPT_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


@dataclass(frozen=True)
class Row:
    """One record in the common form: a prompt and a completion, or messages.

    A text row has prompt "" and everything in completion. A row of messages has neither.
    """

    row_id: str
    kind: str
    prompt: str = ""
    completion: str = ""
    messages: tuple[Message, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()  # JSON schemas, for the template
    weight: float = 1.0  # scales the loss of the whole row
    source: str = ""  # which part of a mixture it is from
    group: str | None = None  # rows of one group stay on one side of a split
    time: float | str | None = None  # for a split by time


@dataclass(frozen=True)
class RowReading:
    """How records become rows; column names may be dotted to reach into nested objects.

    Attributes:
        columns: our field -> the source's column, e.g. {"question": "Body"}; "message.role" and
            "message.content" name keys inside each message.
        group_key, time_key, id_key: columns of what Row.group and Row.time hold, and of an id that
            may occur only once.
        answer_form: AS_IS, or what answer_form.py makes of prompts' answers.
        as_messages: prompt and completion become a user's and an assistant's turn.
    """

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    group_key: str | None = None
    time_key: str | None = None
    id_key: str | None = None
    as_messages: bool = False
    answer_form: str = AS_IS


# One record --------------------------------------------------------------------------------------


def read_row(
    row_id: str,
    record: Mapping[str, Any],
    kind: str,
    reading: RowReading = RowReading(),
    source: str = "",
) -> Row | Rejection:
    """One record as a Row, or why not. `kind` is one of FIELDS."""
    try:
        fields = rename(record, reading.columns)
        body = _READERS[kind](fields, reading.columns or {})
        if reading.answer_form == THINK_ANSWER and kind in KINDS_WITH_ANSWERS:
            body["completion"] = think_answer(body.get("completion", ""))
        if reading.as_messages:
            body = _as_messages(body, fields)
        weight = fields.get("weight")
        return Row(
            row_id,
            **body,
            weight=1.0 if weight is None else weight_of(decimal(weight), ROW_WEIGHT, ""),
            source=source,
            group=group_of(record, reading.group_key),
            time=time_of(record, reading.time_key),
        )
    except Unusable as unusable:
        return Rejection(row_id, unusable.reason, unusable.detail)


def _prompt_completion(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    prompt, completion = (field_of(fields, name, columns) for name in ("prompt", "completion"))
    if not isinstance(prompt, list) and not isinstance(completion, list):
        prompt = string_of(fields, "prompt", columns, may_be_empty=True)
        completion = string_of(fields, "completion", columns)
        return {"kind": "prompt_completion", "prompt": prompt, "completion": completion}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise Unusable(
            MIXED_FORMS, f"prompt: {type_name(prompt)}, completion: {type_name(completion)}"
        )
    if not completion:
        raise Unusable(FIELD_EMPTY.format("completion"))
    keys = message_keys(columns, "role", "content")
    context = [read_message(turn, n, keys, off=True) for n, turn in enumerate(prompt, start=1)]
    answers = [
        read_message(turn, n, keys) for n, turn in enumerate(completion, start=len(prompt) + 1)
    ]
    return _conversation([*context, *answers], fields)


def _question_answer(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    prompt = QUESTION_PROMPT.format(question=string_of(fields, "question", columns))
    answer = string_of(fields, "answer", columns)
    return {"kind": "question_answer", "prompt": prompt, "completion": answer}


def _alpaca(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for name in ("history", "system"):
        if fields.get(name):
            raise Unusable(FIELD_UNSUPPORTED.format(name), "write such rows as messages")
    instruction = string_of(fields, "instruction", columns)
    output = string_of(fields, "output", columns)
    given = ""
    if fields.get("input") is not None:
        given = string_of(fields, "input", columns, may_be_empty=True)
    prompt = ALPACA_PROMPT_INPUT if given.strip() else ALPACA_PROMPT
    prompt = prompt.format(instruction=instruction, input=given)
    return {"kind": "alpaca", "prompt": prompt, "completion": output}


def _text(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {"kind": "text", "completion": string_of(fields, "text", columns)}


def _as_messages(body: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """A prompt and its completion as two turns; without the frame that a kind puts around them,
    which is the chat template's business then."""
    kind = body["kind"]
    if kind not in ("prompt_completion", "question_answer", "alpaca"):
        return body
    asked = body["prompt"]
    if kind == "question_answer":
        asked = fields["question"]
    elif kind == "alpaca":
        asked = "\n\n".join(
            t for t in (fields["instruction"], fields.get("input") or "") if t.strip()
        )
    if not asked.strip():
        raise Unusable(FIELD_EMPTY.format("prompt"))
    turns = (("user", asked), ("assistant", body["completion"]))
    messages = [Message({"role": role, "content": content}) for role, content in turns]
    return _conversation(messages, fields, kind)


def _messages(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    keys = message_keys(columns, "role", "content")
    turns = _turns(fields, "messages", columns)
    return _conversation([read_message(turn, n, keys) for n, turn in enumerate(turns, 1)], fields)


def _sharegpt(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    keys = message_keys(columns, "from", "value", SHAREGPT_ROLES)
    turns = _turns(fields, "conversations", columns)
    messages = [read_message(turn, n, keys) for n, turn in enumerate(turns, 1)]
    if fields.get("system") is not None:
        system = string_of(fields, "system", columns, may_be_empty=True)
        if system.strip():
            if messages[0].role == "system":
                raise Unusable(TWO_SYSTEMS)
            messages.insert(0, Message({"role": "system", "content": system}))
    return _conversation(messages, fields, "sharegpt")


_READERS: dict[str, Callable[[dict[str, Any], Mapping[str, str]], dict[str, Any]]] = {
    "prompt_completion": _prompt_completion,
    "question_answer": _question_answer,
    "alpaca": _alpaca,
    "messages": _messages,
    "sharegpt": _sharegpt,
    "text": _text,
}


def _conversation(
    messages: list[Message], fields: dict[str, Any], kind: str = "messages"
) -> dict[str, Any]:
    """What makes a row of messages worth reading; their order is the template's business."""
    weights = [message.weight for message in messages if message.role == "assistant"]
    if not weights:
        raise Unusable(NO_ASSISTANT, f"{len(messages)} turns")
    if not any(weights):
        raise Unusable(ALL_OFF, f"{len(weights)} assistant turns")
    return {"kind": kind, "messages": tuple(messages), "tools": read_tools(fields.get("tools"))}


def _turns(fields: dict[str, Any], name: str, columns: Mapping[str, str]) -> list[Any]:
    value = field_of(fields, name, columns)
    if not isinstance(value, list):
        raise Unusable(FIELD_NOT_LIST.format(name), type_name(value))
    if not value:
        raise Unusable(FIELD_EMPTY.format(name))
    return value


# All records -------------------------------------------------------------------------------------


def open_rows(
    source: SourceSpec,
    reading: RowReading,
    section: str = "dataset",
    notes: RowNotes | None = None,
) -> tuple[FormatDecision, Iterator[Row | Rejection]]:
    """Decide the kind on the first records, then stream all of them, those first ones included.

    Records that could not be read come through as the rejections they are.

    Args:
        notes: filled while the rows are read; what is noticed in them is counted there.

    Raises:
        DataError: no kind can be decided, `reading` names what there isn't, or nothing is there.
    """
    check_columns(reading.columns, section if section.startswith("dataset") else "dataset")
    notes = RowNotes() if notes is None else notes
    records = read_rows(source, section, notes)
    sample = list(islice(records, SAMPLE_ROWS))
    first = [record for _, record in sample]
    decision = decide_format(first, reading.format, reading.columns, section)
    if reading.answer_form != AS_IS and decision.kind not in KINDS_WITH_ANSWERS:
        raise DataError(
            f"dataset.answer_form={reading.answer_form} is for rows with one answer each "
            f"({', '.join(KINDS_WITH_ANSWERS)}), but these are {decision.kind} ({decision.why}). "
            "Set dataset.answer_form=as_is"
        )
    return decision, _read_all(chain(sample, records), decision.kind, reading, source.name)


def _read_all(
    records: Iterable[tuple[str, Mapping[str, Any] | Rejection]],
    kind: str,
    reading: RowReading,
    source: str,
) -> Iterator[Row | Rejection]:
    seen: dict[bytes, str] = {}
    for row_id, record in records:
        if isinstance(record, Rejection):
            yield record
            continue
        row = read_row(row_id, record, kind, reading, source)
        if reading.id_key is not None and isinstance(row, Row):
            row = _claim_id(row, record, reading.id_key, seen)
        yield row


def _claim_id(
    row: Row, record: Mapping[str, Any], key: str, seen: dict[bytes, str]
) -> Row | Rejection:
    """The row if its id is new. A rejected row claims none: its repaired copy may follow."""
    try:
        value = scalar_of(record, key, NO_ID, BAD_ID)
    except Unusable as unusable:
        return Rejection(row.row_id, unusable.reason, unusable.detail)
    digest = hashlib.blake2b(value.encode("utf-8"), digest_size=16).digest()
    first = seen.setdefault(digest, row.row_id)
    if first == row.row_id:
        return row
    return Rejection(row.row_id, DUPLICATED_ID, f"{show(value)} is the id of {first} already")


def load_rows(
    source: SourceSpec,
    limit: int,
    *,
    reading: RowReading = RowReading(),
    section: str = "eval",
) -> list[Row]:
    """The first `limit` usable rows, to show answers to a person."""
    _, rows = open_rows(source, reading, section)
    return list(islice((row for row in rows if isinstance(row, Row)), limit))
