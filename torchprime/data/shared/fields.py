"""Checked fields of one record, and the reasons why a record cannot be used.

REASONS lists every reason; documents and reports rely on it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date, datetime
from typing import Any

MAX_WEIGHT = 10
KEY_WEIGHTS = 1e-6, 1e6  # the range of dataset.weight_key besides 0: fp32 has room around it
MAX_NESTING = 64  # of tools and tool calls; templates and hashes walk them recursively

FIELD_MISSING = "field {} is missing"
FIELD_NULL = "field {} is null"
FIELD_NOT_STRING = "field {} is not a string"
FIELD_EMPTY = "field {} is empty"
FIELD_NOT_LIST = "field {} is not a list"
FIELD_NOT_UNICODE = "field {} is not valid Unicode"
FIELD_UNSUPPORTED = "field {} is not supported in text rows"
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
MESSAGE_SWITCH = "message {} is not true or false"
SWITCHES_DIFFER = "weights and switches of a message contradict each other"
MASK_UNCLEAR = "mask is not read: its meaning differs between trainers"
BAD_TRAIN_DETAIL = "message {} is not a list of parts of its content"
ANSWER_WEIGHTS_DIFFER = "turns that make up one answer have different weights"
TWO_REASONINGS = "reasoning of an answer is given twice and differs"
BAD_TOOL_CALLS = "tool_calls is not a list of calls with a name"
BAD_FUNCTION_CALL = "function_call is not JSON of calls with a name"
BAD_ARGUMENTS = "arguments of a tool call are not a JSON object"
CALLS_DIFFER = "tool_calls and function_call are given and differ"
BAD_TOOLS = "tools is not a list of objects"
TOOLS_DIFFER = "tools and functions are given and differ"
TOO_NESTED = "nested more than 64 levels deep"
TWO_SYSTEMS = "system is given twice: as a field and as the first turn"
BAD_HISTORY = "history is not a list of pairs or of messages"
ONLY_LAST = "only_last is not true or false"
NO_ASSISTANT = "no assistant turn to learn from"
ALL_OFF = "every assistant turn has weight 0"
ROW_WEIGHT = "row weight is not a number from 0 to 10"
NO_FINAL_LINE = "answer is not reasoning and one line of #### and a value"
CHOSEN_ELSEWHERE = "chosen does not continue the prompt"
BAD_TREE = "tree message is not an object with text and role"
BAD_RANK = "tree message rank is not a number"
NO_PARENT = "tree message without its parent"
TWO_ROOTS = "tree with more than one first message"
TREE_AGAIN = "tree id comes again after another tree"
NO_GROUP = "group_key {} is missing"
BAD_GROUP = "group_key {} is not a string or number"
NO_TIME = "time_key {} is missing"
BAD_TIME = "time_key {} is not a number or an ISO date"
NO_WEIGHT = "weight_key {} is missing"
BAD_WEIGHT = "weight_key {} is not 0 or a number from 1e-6 to 1e6"
NO_ID = "id_key {} is missing"
BAD_ID = "id_key {} is not a string or number"
DUPLICATED_ID = "duplicated id"
# All reasons; {} stands for the name of a field or column.
REASONS = (
    *(FIELD_MISSING, FIELD_NULL, FIELD_NOT_STRING, FIELD_EMPTY, FIELD_NOT_LIST),
    *(FIELD_NOT_UNICODE, FIELD_UNSUPPORTED, MIXED_FORMS),
    *(MESSAGE_NOT_OBJECT, MESSAGE_NO_ROLE, UNKNOWN_ROLE, CONTENT_NULL, CONTENT_NOT_TEXT),
    *(CONTENT_EMPTY, MESSAGE_NOT_STRING, MESSAGE_NOT_UNICODE, MESSAGE_WEIGHT, MESSAGE_SWITCH),
    *(SWITCHES_DIFFER, MASK_UNCLEAR, BAD_TRAIN_DETAIL, ANSWER_WEIGHTS_DIFFER, TWO_REASONINGS),
    *(BAD_TOOL_CALLS, BAD_FUNCTION_CALL, BAD_ARGUMENTS, CALLS_DIFFER, BAD_TOOLS, TOOLS_DIFFER),
    *(TOO_NESTED, TWO_SYSTEMS, BAD_HISTORY, ONLY_LAST, NO_ASSISTANT, ALL_OFF, ROW_WEIGHT),
    *(NO_FINAL_LINE, CHOSEN_ELSEWHERE, BAD_TREE, BAD_RANK, NO_PARENT, TWO_ROOTS, TREE_AGAIN),
    *(NO_GROUP, BAD_GROUP, NO_TIME, BAD_TIME, NO_WEIGHT, BAD_WEIGHT),
    *(NO_ID, BAD_ID, DUPLICATED_ID),
)

MISSING = object()  # a missing value, as opposed to null
_DECIMAL = re.compile(r"-?[0-9]{1,300}(?:\.[0-9]{1,300})?")
_ISO_TIME = re.compile(
    r"([0-9]{4}-[0-9]{2}-[0-9]{2})"
    r"(?:[T ]([0-9]{2}:[0-9]{2})(:[0-9]{2})?(?:[.,]([0-9]+))?(?:(Z)|([+-][0-9]{2}):?([0-9]{2}))?)?"
)


class Unusable(Exception):
    """An exception that ends the reading of one record; `read_row` makes a Rejection of it."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


# Strings and numbers -----------------------------------------------------------------------------


def lookup(record: Mapping[str, Any], column: str) -> Any:
    """Return the column of that name, else the value at the dotted path, else MISSING."""
    if column in record:
        return record[column]
    value: Any = record
    for key in column.split("."):
        if not isinstance(value, Mapping) or key not in value:
            return MISSING
        value = value[key]
    return value


def field_of(fields: dict[str, Any], name: str, columns: Mapping[str, str]) -> Any:
    """Return a field that must be present and not null."""
    if name not in fields:
        column = f"column {columns[name]}; " if name in columns else ""
        found = ", ".join(sorted(map(str, fields))) or "nothing"
        raise Unusable(FIELD_MISSING.format(name), printable(f"{column}found {found}"))
    if fields[name] is None:
        raise Unusable(FIELD_NULL.format(name))
    return fields[name]


def string_of(
    fields: dict[str, Any], name: str, columns: Mapping[str, str], may_be_empty: bool = False
) -> str:
    """Return a field that must be a string, with more than white space unless it `may_be_empty`."""
    value = field_of(fields, name, columns)
    if not isinstance(value, str):
        raise Unusable(FIELD_NOT_STRING.format(name), type_name(value))
    if not may_be_empty and not value.strip():
        raise Unusable(FIELD_EMPTY.format(name))
    if not is_unicode(value):
        raise Unusable(FIELD_NOT_UNICODE.format(name), "a lone surrogate")
    return value


def decimal(value: Any) -> Any:
    """Return the number in a plain decimal string: a CSV file has columns of strings only."""
    if isinstance(value, str) and _DECIMAL.fullmatch(value):
        return float(value)
    return value


def weight_of(value: Any, reason: str, where: str) -> float:
    """Return a number from 0 to MAX_WEIGHT."""
    # NaN compares false with everything.
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= MAX_WEIGHT:
        return float(value)
    raise Unusable(reason, where + show(value))


# Keys of rows ------------------------------------------------------------------------------------


def scalar_of(record: Mapping[str, Any], key: str, missing: str, wrong: str) -> str:
    """Return the column as text, or None; exports write null, NaN and blank text for "none"."""
    value = lookup(record, key)
    if value is MISSING or value is None or value != value:
        raise Unusable(missing.format(key))
    if not isinstance(value, (str, int, float, date)):
        raise Unusable(wrong.format(key), type_name(value))
    text = str(value)
    if not text.strip():
        raise Unusable(missing.format(key), "empty")
    if not is_unicode(text):
        raise Unusable(wrong.format(key), "not valid Unicode: a lone surrogate")
    return text


def group_of(record: Mapping[str, Any], key: str | None) -> str | None:
    """Return the value for Row.group."""
    return None if key is None else scalar_of(record, key, NO_GROUP, BAD_GROUP)


def time_of(record: Mapping[str, Any], key: str | None) -> float | str | None:
    """Return the value for Row.time: a finite number, or an ISO date or date and time.

    The text is in a form that every supported Python can parse.
    """
    if key is None:
        return None
    value = decimal(lookup(record, key))
    if value is MISSING or value is None:
        raise Unusable(NO_TIME.format(key))
    if isinstance(value, date):  # a datetime is a date; Arrow has columns of them
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
            raise Unusable(BAD_TIME.format(key), show(value)) from None
        return moment.isoformat() if minute else day
    raise Unusable(BAD_TIME.format(key), show(value))


def key_weight_of(record: Mapping[str, Any], key: str | None) -> float:
    """Return the factor of the row's loss in a column; 1 without a column's name."""
    if key is None:
        return 1.0
    value = decimal(lookup(record, key))
    if value is MISSING or value is None:
        raise Unusable(NO_WEIGHT.format(key))
    least, most = KEY_WEIGHTS
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and (value == 0 or least <= value <= most):  # NaN compares false with everything
        return float(value)
    raise Unusable(BAD_WEIGHT.format(key), show(value))


# Checks and texts --------------------------------------------------------------------------------


def check_nested(value: Any, reason: str, where: str) -> None:
    """Raise Unusable for a nested value that later steps can't process.

    That is a lone surrogate in a string or key, bytes that are no text, or too deep nesting for a
    recursive walk.
    """
    stack: list[tuple[Any, int]] = [(value, 0)]
    while stack:
        item, depth = stack.pop()
        if isinstance(item, str):
            if not is_unicode(item):
                raise Unusable(reason, f"{where}: a lone surrogate")
        elif isinstance(item, (bytes, bytearray)):  # a column of bytes that are not UTF-8
            raise Unusable(reason, f"{where}: {len(item)} bytes that are not UTF-8")
        elif isinstance(item, (Mapping, list, tuple)):
            if depth > MAX_NESTING:
                raise Unusable(TOO_NESTED, where)
            if isinstance(item, Mapping):
                stack.extend((key, depth) for key in item)
                item = item.values()
            stack.extend((child, depth + 1) for child in item)


def is_unicode(value: str) -> bool:
    """Return True for text without lone surrogates, which JSON allows but no tokenizer accepts."""
    if value.isascii():
        return True
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def parse_json(text: str) -> Any:
    """Return the parsed JSON text, or MISSING."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return MISSING


def type_name(value: Any) -> str:
    """Return the JSON name of the value's type, for messages."""
    names = {type(None): "null", bool: "a boolean", str: "a string", list: "a list"}
    names |= {int: "a number", float: "a number", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def show(value: Any) -> str:
    """Return a short form of a value for a message: its type if it could be large."""
    if not isinstance(value, (str, int, float)):
        return type_name(value)
    return printable(repr(value[:60] if isinstance(value, str) else value), 80)


def printable(text: str, limit: int = 200) -> str:
    """Truncate to the limit and remove lone surrogates, which can't be encoded."""
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= limit else text[:limit] + "..."
