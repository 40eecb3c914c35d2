"""What a row means: six kinds of record become a prompt and a completion, or messages.

    prompt_completion  {prompt, completion}           strings as they are; or two lists of messages
    question_answer    {question, answer}             the question inside QUESTION_PROMPT
    alpaca             {instruction, input?, output}  inside the prompts of the original Alpaca
    messages           {messages, tools?}             [{role, content, tool_calls?, weight?, ...}]
    sharegpt           {conversations, tools?, system?}   [{from, value}], made messages
    text               {text}                         no prompt; everything is completion

`auto` decides once, on the first rows, and refuses to guess between kinds; `columns` says which
columns of the source the fields are in. Messages come out in one form whatever they came in: roles
system, developer, user, assistant and tool, content a string, and the arguments of a tool call an
object where they were the text of one (what a chat template writes with `tojson` is then the call,
not a quotation of it). A record that can't be used is a `Rejection`, to be counted, not an
exception: its reason is one of REASONS, its detail this record's own.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import lru_cache
from itertools import chain, islice
from typing import Any

from torchprime.data.records import Rejection
from torchprime.data.sources import SourceSpec, read_rows
from torchprime.errors import DataError

# What a record needs to be of a kind.
FIELDS: dict[str, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
}
STRUCTURED = ("messages", "sharegpt")
CANONICAL_FIELDS = (
    *(field for fields in FIELDS.values() for field in fields),
    *("input", "system", "history", "tools", "weight", "message.role", "message.content"),
)
SAMPLE_ROWS = 100

QUESTION_PROMPT = "Question:\n{question}\n\n\nAnswer:\n"
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

ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "model": "assistant", "function": "tool"},
}
FUNCTION_CALL = "function_call"
SHAREGPT_ROLES = {
    **{"system": "system", "human": "user", "user": "user", "tool": "tool"},
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", FUNCTION_CALL), "assistant"),
    **dict.fromkeys(("observation", "function_response"), "tool"),
}
# What else of a message a chat template sees; all strings.
MESSAGE_STRINGS = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")

MAX_WEIGHT = 10
LONGEST_SHARED_TOOLS = 100_000  # characters
MAX_NESTING = 64  # of tools and tool calls; templates and hashes walk them recursively

FIELD_MISSING = "field {} is missing"
FIELD_NULL = "field {} is null"
FIELD_NOT_STRING = "field {} is not a string"
FIELD_EMPTY = "field {} is empty"
FIELD_NOT_LIST = "field {} is not a list"
FIELD_NOT_UNICODE = "field {} is not valid Unicode"
FIELD_UNSUPPORTED = "field {} is not supported in alpaca rows"
MIXED_FORMS = "only one of prompt and completion is a list of messages"
MESSAGE_NOT_OBJECT = "message is not an object"
MESSAGE_NO_ROLE = "message has no role"
UNKNOWN_ROLE = "unknown role"
CONTENT_NULL = "message content is null"
CONTENT_NOT_TEXT = "message content is not text"
CONTENT_EMPTY = "message content is empty"
MESSAGE_NOT_STRING = "message {} is not a string"
MESSAGE_NOT_UNICODE = "message is not valid Unicode"
MESSAGE_WEIGHT = "message weight is not a number from 0 to 10"
MESSAGE_WEIGHTS_DIFFER = "message weight and loss_weight differ"
MESSAGE_TRAIN = "message train is not true or false"
BAD_TOOL_CALLS = "tool_calls is not a list of calls with name and arguments"
BAD_FUNCTION_CALL = "function_call is not JSON of calls with name and arguments"
BAD_TOOLS = "tools is not a list of objects"
TOO_NESTED = "nested more than 64 levels deep"
TWO_SYSTEMS = "system is given twice: as a field and as the first turn"
NO_ASSISTANT = "no assistant turn to learn from"
ALL_OFF = "every assistant turn has weight 0"
ROW_WEIGHT = "row weight is not a number from 0 to 10"
NO_GROUP = "group_key {} is missing"
BAD_GROUP = "group_key {} is not a string or number"
NO_TIME = "time_key {} is missing"
BAD_TIME = "time_key {} is not a number or an ISO date"
NO_ID = "id_key {} is missing"
BAD_ID = "id_key {} is not a string or number"
DUPLICATED_ID = "duplicated id"
# Every reason there is; {} stands for the name of a field or column.
REASONS = (
    *(FIELD_MISSING, FIELD_NULL, FIELD_NOT_STRING, FIELD_EMPTY, FIELD_NOT_LIST),
    *(FIELD_NOT_UNICODE, FIELD_UNSUPPORTED, MIXED_FORMS),
    *(MESSAGE_NOT_OBJECT, MESSAGE_NO_ROLE, UNKNOWN_ROLE, CONTENT_NULL, CONTENT_NOT_TEXT),
    *(CONTENT_EMPTY, MESSAGE_NOT_STRING, MESSAGE_NOT_UNICODE, MESSAGE_WEIGHT),
    *(MESSAGE_WEIGHTS_DIFFER, MESSAGE_TRAIN, BAD_TOOL_CALLS, BAD_FUNCTION_CALL, BAD_TOOLS),
    *(TOO_NESTED, TWO_SYSTEMS, NO_ASSISTANT, ALL_OFF, ROW_WEIGHT),
    *(NO_GROUP, BAD_GROUP, NO_TIME, BAD_TIME, NO_ID, BAD_ID, DUPLICATED_ID),
)

_MISSING = object()
_DECIMAL = re.compile(r"-?[0-9]{1,300}(?:\.[0-9]{1,300})?")
_ISO_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ]([0-9]{2}:[0-9]{2})(:[0-9]{2})?(?:[.,]([0-9]+))?(?:(Z)|([+-][0-9]{2}):?([0-9]{2}))?)?"
)


@dataclass(frozen=True)
class Message:
    """One turn. `template` is what a chat template sees: role, content, tool_calls and the like.

    `content` is a string, or None for an assistant that only calls tools. `weight` scales the loss
    of an assistant turn, 0 for a turn that is not trained on.
    """

    template: Mapping[str, Any]
    weight: float = 1.0

    @property
    def role(self) -> str:
        return self.template["role"]

    @property
    def content(self) -> str:
        return self.template.get("content") or ""


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
class FormatDecision:
    """The kind all rows are read as, and why."""

    kind: str
    why: str


@dataclass(frozen=True)
class RowReading:
    """How records become rows; column names may be dotted to reach into nested objects.

    Attributes:
        columns: our field -> the source's column, e.g. {"question": "Body"}; "message.role" and
            "message.content" name keys inside each message.
        group_key, time_key, id_key: columns of what Row.group and Row.time hold, and of an id that
            may occur only once.
        as_messages: prompt and completion become a user's and an assistant's turn.
    """

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    group_key: str | None = None
    time_key: str | None = None
    id_key: str | None = None
    as_messages: bool = False


# Which kind --------------------------------------------------------------------------------------


def decide_format(
    sample: Sequence[Mapping[str, Any] | Rejection],
    requested: str,
    columns: Mapping[str, str] | None = None,
    section: str = "dataset",
) -> FormatDecision:
    """Take the requested kind, or the one kind whose fields the sampled records have.

    A list of messages is preferred over strings beside it, since those are made from it; between
    other kinds nothing is preferred.

    Raises:
        DataError: an unknown kind or canonical field; or `auto` finds no kind, or more than one.
    """
    config = section if section.startswith("dataset") else "dataset"
    _check_columns(columns, config)
    if requested in FIELDS:
        return FormatDecision(requested, f"{config}.format={requested}")
    if requested != "auto":
        close = difflib.get_close_matches(requested, ["auto", *FIELDS], n=1)
        raise DataError(
            f"{config}.format={requested} is not known, expected auto, {', '.join(FIELDS)}"
            + (f". Did you mean {close[0]}?" if close else "")
        )
    records = [_rename(row, columns) for row in sample if not isinstance(row, Rejection)]
    if sample and not records:
        raise DataError(_unreadable([row for row in sample if isinstance(row, Rejection)], section))
    fits = [_fitting_kinds(row) for row in records]
    chosen = [_preferred(kinds, row) for kinds, row in zip(fits, records, strict=True)]
    counts = Counter(" + ".join(kinds) for kinds in chosen)
    unknown = counts.pop("", 0)
    kind = next(iter(counts), "")
    if len(counts) == 1 and kind in FIELDS:
        beside = Counter(k for kinds in fits if len(kinds) > 1 for k in kinds if k != kind)
        return FormatDecision(kind, _why(kind, counts[kind], len(sample), beside))
    if counts:
        found = ", ".join(f"{kinds}: {n} rows" for kinds, n in counts.most_common())
        raise DataError(
            f"{config}.format=auto cannot decide: the first {len(sample)} rows of the {section} "
            f"source are a mixture ({found}{f', none: {unknown} rows' if unknown else ''}). Set "
            f"{config}.format to one of {', '.join(FIELDS)}"
        )
    raise DataError(_no_kind(records, columns, len(sample), config, section))


def _why(kind: str, fitting: int, sampled: int, beside: Counter[str]) -> str:
    why = f"{fitting} of the first {sampled} rows have {' and '.join(FIELDS[kind])}"
    if beside:
        others = ", ".join(f"{' and '.join(FIELDS[k])} ({n} rows)" for k, n in beside.items())
        why += f", a list of messages, which is preferred over the strings beside it: {others}"
    return why


def _fitting_kinds(row: Mapping[str, Any]) -> list[str]:
    """The kinds whose fields this row has; a null counts only where nothing else fits."""
    full = [k for k, fields in FIELDS.items() if all(row.get(f) is not None for f in fields)]
    return full or [k for k, fields in FIELDS.items() if all(f in row for f in fields)]


def _preferred(kinds: list[str], row: Mapping[str, Any]) -> list[str]:
    """One list of messages over strings, which are its first turn or its last; not over text."""
    lists = [k for k in kinds if k in STRUCTURED and isinstance(row[FIELDS[k][0]], list)]
    if len(lists) != 1 or "text" in kinds:
        return kinds
    others = [row[field] for k in kinds if k not in lists for field in FIELDS[k]]
    return lists if all(isinstance(value, str) for value in others) else kinds


def _unreadable(rejections: list[Rejection], section: str) -> str:
    counts = ", ".join(f"{r}: {n}" for r, n in Counter(r.reason for r in rejections).most_common())
    first = rejections[0]
    return (
        f"dataset.format=auto cannot decide: none of the first {len(rejections)} rows of the "
        f"{section} source can be read ({counts}; the first is {first.row_id}: {first.reason} "
        f"{first.detail}). Check what wrote the file"
    )


def _no_kind(
    records: list[dict[str, Any]],
    columns: Mapping[str, str] | None,
    sampled: int,
    config: str,
    section: str,
) -> str:
    found = sorted({str(key) for row in records for key in row})
    known = " or ".join(f"{{{', '.join(fields)}}} ({k})" for k, fields in FIELDS.items())
    absent = [
        f"{field} (column {column})"
        for field, column in (columns or {}).items()
        if not field.startswith("message.") and not any(field in row for row in records)
    ]
    return (
        f"{config}.format=auto cannot decide: none of the first {sampled} rows of the {section} "
        f"source has the fields of a known kind. Found "
        f"{_printable(', '.join(found)) or 'no fields'}; expected {known}."
        + (f" No row has {', '.join(absent)} of {config}.columns." if absent else "")
        + f" Say which columns they are, e.g. {config}.columns={{prompt: COLUMN, "
        "completion: COLUMN}, or rename them in the file"
    )


# Columns -----------------------------------------------------------------------------------------


def _check_columns(columns: Mapping[str, str] | None, config: str) -> None:
    for field, column in (columns or {}).items():
        given = f"{config}.columns={{{field}: {column}}}"
        if field not in CANONICAL_FIELDS:
            if column in CANONICAL_FIELDS:
                hint = f"Our field comes first: {config}.columns={{{column}: {field}}}"
            else:
                close = difflib.get_close_matches(str(field).lower(), CANONICAL_FIELDS, n=1)
                hint = f"Did you mean {close[0]}?" if close else "The source's column comes second"
            raise DataError(
                f"{given}: there is no field {field}, expected one of "
                f"{', '.join(CANONICAL_FIELDS)}. {hint}"
            )
        if not isinstance(column, str) or not column:
            raise DataError(f"{given}: expected the name of a column, as in {{{field}: Body}}")


def _rename(record: Mapping[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """The record under our names. A mapped field comes from its column and from nowhere else."""
    if not columns:
        return record if isinstance(record, dict) else dict(record)
    taken = {*columns, *columns.values()}
    renamed = {key: value for key, value in record.items() if key not in taken}
    for field, column in columns.items():
        value = _lookup(record, column)
        if value is not _MISSING:
            renamed[field] = value
    return renamed


def _lookup(record: Mapping[str, Any], column: str) -> Any:
    """The column of that name, else what the dots lead to, else _MISSING."""
    if column in record:
        return record[column]
    value: Any = record
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return _MISSING
        value = value[key]
    return value


# One record --------------------------------------------------------------------------------------


class _Unusable(Exception):
    """Ends the reading of one record, inside this file only."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def read_row(
    row_id: str,
    record: Mapping[str, Any],
    kind: str,
    reading: RowReading = RowReading(),
    source: str = "",
) -> Row | Rejection:
    """One record as a Row, or why not. `kind` is one of FIELDS."""
    try:
        fields = _rename(record, reading.columns)
        body = _READERS[kind](fields, reading.columns or {})
        if reading.as_messages:
            body = _as_messages(body, fields)
        weight = fields.get("weight")
        return Row(
            row_id,
            **body,
            weight=1.0 if weight is None else _weight(_decimal(weight), ROW_WEIGHT, ""),
            source=source,
            group=_group(record, reading.group_key),
            time=_time(record, reading.time_key),
        )
    except _Unusable as unusable:
        return Rejection(row_id, unusable.reason, unusable.detail)


def _prompt_completion(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    prompt, completion = (_field(fields, name, columns) for name in ("prompt", "completion"))
    if not isinstance(prompt, list) and not isinstance(completion, list):
        prompt = _string(fields, "prompt", columns, may_be_empty=True)
        completion = _string(fields, "completion", columns)
        return {"kind": "prompt_completion", "prompt": prompt, "completion": completion}
    if not isinstance(prompt, list) or not isinstance(completion, list):
        raise _Unusable(MIXED_FORMS, f"prompt: {_type(prompt)}, completion: {_type(completion)}")
    if not completion:
        raise _Unusable(FIELD_EMPTY.format("completion"))
    keys = _message_keys(columns, "role", "content")
    context = [_message(turn, n, keys, off=True) for n, turn in enumerate(prompt, start=1)]
    answers = [_message(turn, n, keys) for n, turn in enumerate(completion, start=len(prompt) + 1)]
    return _conversation([*context, *answers], fields)


def _question_answer(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    prompt = QUESTION_PROMPT.format(question=_string(fields, "question", columns))
    answer = _string(fields, "answer", columns)
    return {"kind": "question_answer", "prompt": prompt, "completion": answer}


def _alpaca(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    for name in ("history", "system"):
        if fields.get(name):
            raise _Unusable(FIELD_UNSUPPORTED.format(name), "write such rows as messages")
    instruction = _string(fields, "instruction", columns)
    output = _string(fields, "output", columns)
    given = ""
    if fields.get("input") is not None:
        given = _string(fields, "input", columns, may_be_empty=True)
    prompt = ALPACA_PROMPT_INPUT if given.strip() else ALPACA_PROMPT
    prompt = prompt.format(instruction=instruction, input=given)
    return {"kind": "alpaca", "prompt": prompt, "completion": output}


def _text(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    return {"kind": "text", "completion": _string(fields, "text", columns)}


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
        raise _Unusable(FIELD_EMPTY.format("prompt"))
    turns = (("user", asked), ("assistant", body["completion"]))
    messages = [Message({"role": role, "content": content}) for role, content in turns]
    return _conversation(messages, fields, kind)


def _messages(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    keys = _message_keys(columns, "role", "content")
    turns = _turns(fields, "messages", columns)
    return _conversation([_message(turn, n, keys) for n, turn in enumerate(turns, 1)], fields)


def _sharegpt(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    keys = _message_keys(columns, "from", "value", SHAREGPT_ROLES)
    turns = _turns(fields, "conversations", columns)
    messages = [_message(turn, n, keys) for n, turn in enumerate(turns, 1)]
    if fields.get("system") is not None:
        system = _string(fields, "system", columns, may_be_empty=True)
        if system.strip():
            if messages[0].role == "system":
                raise _Unusable(TWO_SYSTEMS)
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
        raise _Unusable(NO_ASSISTANT, f"{len(messages)} turns")
    if not any(weights):
        raise _Unusable(ALL_OFF, f"{len(weights)} assistant turns")
    return {"kind": kind, "messages": tuple(messages), "tools": _tools(fields.get("tools"))}


# Fields ------------------------------------------------------------------------------------------


def _field(fields: dict[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    if name not in fields:
        column = f"column {columns[name]}; " if name in columns else ""
        found = ", ".join(sorted(map(str, fields))) or "nothing"
        raise _Unusable(FIELD_MISSING.format(name), _printable(f"{column}found {found}"))
    if fields[name] is None:
        raise _Unusable(FIELD_NULL.format(name))
    return fields[name]


def _string(
    fields: dict[str, Any], name: str, columns: Mapping[str, str], may_be_empty: bool = False
) -> str:
    value = _field(fields, name, columns)
    if not isinstance(value, str):
        raise _Unusable(FIELD_NOT_STRING.format(name), _type(value))
    if not may_be_empty and not value.strip():
        raise _Unusable(FIELD_EMPTY.format(name))
    if not _is_unicode(value):
        raise _Unusable(FIELD_NOT_UNICODE.format(name), "a lone surrogate")
    return value


def _turns(fields: dict[str, Any], name: str, columns: Mapping[str, str]) -> list[Any]:
    value = _field(fields, name, columns)
    if not isinstance(value, list):
        raise _Unusable(FIELD_NOT_LIST.format(name), _type(value))
    if not value:
        raise _Unusable(FIELD_EMPTY.format(name))
    return value


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    """A list of objects, or the text of one; null and blank text are none."""
    if not isinstance(value, str):
        return _tool_list(value)
    shared = len(value) <= LONGEST_SHARED_TOOLS
    return _shared_tools(value) if shared else _tools_of_text(value)


def _tools_of_text(text: str) -> tuple[Mapping[str, Any], ...]:
    return _tool_list(_parse(text) if text.strip() else None)


# Conversations share their tools: the same text is read and checked once.
_shared_tools = lru_cache(maxsize=256)(_tools_of_text)


def _tool_list(value: Any) -> tuple[Mapping[str, Any], ...]:
    if value is None:  # what the text "null" says, too
        return ()
    if not isinstance(value, list):
        raise _Unusable(BAD_TOOLS, "malformed JSON" if value is _MISSING else _type(value))
    for tool in value:
        if not isinstance(tool, Mapping):
            raise _Unusable(BAD_TOOLS, f"a list with {_type(tool)}")
    _check_nested(value, FIELD_NOT_UNICODE.format("tools"), "tools")
    return tuple(value)


def _decimal(value: Any) -> Any:
    """The number that a plain decimal spells: a CSV file has columns of strings only."""
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        return float(value)
    return value


def _weight(value: Any, reason: str, where: str) -> float:
    # NaN compares false with everything.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_WEIGHT:
        return float(value)
    raise _Unusable(reason, where + _show(value))


# Messages ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Keys:
    """Where a message says who speaks and what, and the names it has for roles."""

    role: str
    content: str
    roles: Mapping[str, str]


def _message_keys(
    columns: Mapping[str, str], role: str, content: str, roles: Mapping[str, str] = ROLES
) -> _Keys:
    return _Keys(columns.get("message.role", role), columns.get("message.content", content), roles)


def _message(turn: Any, number: int, keys: _Keys, off: bool = False) -> Message:
    """One turn in the common form; `off`: it is context whatever its weight says."""
    where = f"message {number}: "
    if not isinstance(turn, Mapping):
        raise _Unusable(MESSAGE_NOT_OBJECT, where + _type(turn))
    given = turn.get(keys.role)
    if given is None:
        found = ", ".join(sorted(map(str, turn))) or "nothing"
        raise _Unusable(MESSAGE_NO_ROLE, _printable(f"{where}key {keys.role}; found {found}"))
    role = keys.roles.get(given) if isinstance(given, str) else None
    if role is None:
        raise _Unusable(UNKNOWN_ROLE, where + _show(given))
    weight = _message_weight(turn, where)
    weight = 0.0 if off else weight

    content = turn.get(keys.content)
    calls = _tool_calls(turn.get("tool_calls"), BAD_TOOL_CALLS, where)
    if given == FUNCTION_CALL:
        value = _parse(content) if isinstance(content, str) else content
        value = [value] if isinstance(value, Mapping) else value
        calls = [
            {"type": "function", "function": {k: call[k] for k in ("name", "arguments")}}
            for call in _tool_calls(value, BAD_FUNCTION_CALL, where, bare=True)
        ]
        content = None
        if not calls:
            raise _Unusable(BAD_FUNCTION_CALL, where + "no call")
    if content is not None or role != "assistant" or not calls:
        content = _content(content, where)
        if role == "assistant" and weight > 0 and not calls and not content.strip():
            raise _Unusable(CONTENT_EMPTY, where + role)

    template: dict[str, Any] = {"role": role, "content": content}
    if calls:
        template["tool_calls"] = calls
    for name in MESSAGE_STRINGS:
        value = turn.get(name)
        if value is not None:  # Arrow gives every message the keys that any has
            if not isinstance(value, str):
                raise _Unusable(MESSAGE_NOT_STRING.format(name), where + _type(value))
            template[name] = value
    _check_nested(template, MESSAGE_NOT_UNICODE, where.rstrip(": "))
    return Message(template, weight)


def _message_weight(turn: Mapping[str, Any], where: str) -> float:
    given = [turn[key] for key in ("weight", "loss_weight") if turn.get(key) is not None]
    weights = [_weight(value, MESSAGE_WEIGHT, where) for value in given]
    if len(set(weights)) > 1:
        raise _Unusable(MESSAGE_WEIGHTS_DIFFER, f"{where}{weights[0]:g} and {weights[1]:g}")
    train = turn.get("train")
    if train is not None and not isinstance(train, bool):
        raise _Unusable(MESSAGE_TRAIN, where + _show(train))
    return 0.0 if train is False else (weights or [1.0])[0]


def _content(value: Any, where: str) -> str:
    """A string, or the texts of a list of parts, joined."""
    if value is None:
        raise _Unusable(CONTENT_NULL, where.rstrip(": "))
    if isinstance(value, list):
        return "".join(_text_part(part, where) for part in value)
    if not isinstance(value, str):
        raise _Unusable(CONTENT_NOT_TEXT, where + _type(value))
    return value


def _text_part(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise _Unusable(CONTENT_NOT_TEXT, f"{where}a list with {_type(part)}")
    if part.get("type") != "text":
        raise _Unusable(CONTENT_NOT_TEXT, f"{where}a part of type {_show(part.get('type'))}")
    for key in ("text", "value"):
        if isinstance(part.get(key), str):
            return part[key]
    raise _Unusable(CONTENT_NOT_TEXT, f"{where}a part of type text without one")


def _tool_calls(value: Any, reason: str, where: str, bare: bool = False) -> list[dict[str, Any]]:
    """The calls with the text of their arguments parsed where it is an object.

    `bare` calls are {name, arguments}; others may have these inside `function`.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise _Unusable(reason, where + ("malformed JSON" if value is _MISSING else _type(value)))
    calls = []
    for call in value:
        if not isinstance(call, Mapping):
            raise _Unusable(reason, f"{where}a list with {_type(call)}")
        inside = not bare and call.get("function") is not None
        function = call["function"] if inside else call
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise _Unusable(reason, f"{where}a call without a name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            parsed = _parse(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
        elif not isinstance(arguments, Mapping):
            raise _Unusable(reason, f"{where}arguments: {_type(arguments)}")
        function = {**function, "arguments": arguments}
        calls.append({**call, "function": function} if inside else function)
    return calls


# Keys --------------------------------------------------------------------------------------------


def _scalar(record: Mapping[str, Any], key: str, missing: str, wrong: str) -> str:
    """The column as text; null, NaN and blank text are what exports write for "none"."""
    value = _lookup(record, key)
    if value is _MISSING or value is None or value != value:
        raise _Unusable(missing.format(key))
    if not isinstance(value, (str, int, float, date)):
        raise _Unusable(wrong.format(key), _type(value))
    text = str(value)
    if not text.strip():
        raise _Unusable(missing.format(key), "empty")
    if not _is_unicode(text):
        raise _Unusable(wrong.format(key), "not valid Unicode: a lone surrogate")
    return text


def _group(record: Mapping[str, Any], key: str | None) -> str | None:
    return None if key is None else _scalar(record, key, NO_GROUP, BAD_GROUP)


def _time(record: Mapping[str, Any], key: str | None) -> float | str | None:
    """A finite number, or an ISO date or date and time, in the spelling every Python can read."""
    if key is None:
        return None
    value = _decimal(_lookup(record, key))
    if value is _MISSING or value is None:
        raise _Unusable(NO_TIME.format(key))
    if isinstance(value, date):  # a datetime is one; Arrow has columns of them
        return value.isoformat()
    if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
        return float(value)
    if isinstance(value, str) and (found := _ISO_TIME.fullmatch(value.strip())):
        day, minute, second, fraction, utc, hours, minutes = found.groups(default="")
        text = day
        if minute:
            zone = "+00:00" if utc else hours and f"{hours}:{minutes}"
            text = f"{day}T{minute}{second or ':00'}.{fraction[:6].ljust(6, '0')}{zone}"
        try:
            moment = datetime.fromisoformat(text)
        except ValueError:  # no such day
            raise _Unusable(BAD_TIME.format(key), _show(value)) from None
        return moment.isoformat() if minute else day
    raise _Unusable(BAD_TIME.format(key), _show(value))


# Checks and texts --------------------------------------------------------------------------------


def _check_nested(value: Any, reason: str, where: str) -> None:
    """No half surrogate in any string or key, and no nesting that breaks a recursive walk."""
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            if not _is_unicode(item):
                raise _Unusable(reason, f"{where}: a lone surrogate")
        elif isinstance(item, (Mapping, list, tuple)):
            if depth > MAX_NESTING:
                raise _Unusable(TOO_NESTED, where)
            if isinstance(item, Mapping):
                stack.extend((key, depth) for key in item)
                item = item.values()
            stack.extend((child, depth + 1) for child in item)


def _is_unicode(value: str) -> bool:
    """JSON can spell half a surrogate pair; no tokenizer takes it."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _parse(text: str) -> Any:
    """What JSON text says, or _MISSING."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return _MISSING


def _type(value: Any) -> str:
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list"}
    names |= {int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _show(value: Any) -> str:
    """A value for a message: short, and its type where it could be large."""
    if not isinstance(value, (str, int, float)):
        return _type(value)
    return _printable(repr(value[:60] if isinstance(value, str) else value), 80)


def _printable(text: str, limit: int = 200) -> str:
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[:limit] + "..."


# All records -------------------------------------------------------------------------------------


def open_rows(
    source: SourceSpec, reading: RowReading, section: str = "dataset"
) -> tuple[FormatDecision, Iterator[Row | Rejection]]:
    """Decide the kind on the first records, then stream all of them, those first ones included.

    Records that could not be read come through as the rejections they are.

    Raises:
        DataError: no kind can be decided, `reading` names what there isn't, or nothing is there.
    """
    _check_columns(reading.columns, section if section.startswith("dataset") else "dataset")
    records = read_rows(source, section)
    sample = list(islice(records, SAMPLE_ROWS))
    first = [record for _, record in sample]
    decision = decide_format(first, reading.format, reading.columns, section)
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
        value = _scalar(record, key, NO_ID, BAD_ID)
    except _Unusable as unusable:
        return Rejection(row.row_id, unusable.reason, unusable.detail)
    digest = hashlib.blake2b(value.encode("utf-8"), digest_size=16).digest()
    first = seen.setdefault(digest, row.row_id)
    if first == row.row_id:
        return row
    return Rejection(row.row_id, DUPLICATED_ID, f"{_show(value)} is the id of {first} already")


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
