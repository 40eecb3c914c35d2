"""The results of a file's reader: records with ids, or rejections with a reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

MAX_ROW_BYTES = 64 * 2**20  # a longer row is a mistake in the file

MALFORMED_JSON = "malformed JSON"
NOT_UTF8 = "not valid UTF-8"
NOT_AN_OBJECT = "not a JSON object"
BEYOND_PARSER = "JSON beyond the parser's limits"
TOO_LARGE = f"row larger than {MAX_ROW_BYTES // 2**20} MiB"
WRONG_FIELD_COUNT = "wrong number of fields"
# in a typed column: for example a date in the year 300000
OUT_OF_RANGE = "a value that cannot be read"
# The file itself is at fault, not the content of a row.
UNREADABLE = frozenset(
    (MALFORMED_JSON, NOT_UTF8, NOT_AN_OBJECT, BEYOND_PARSER, TOO_LARGE, WRONG_FIELD_COUNT)
)


@dataclass(frozen=True)
class Rejection:
    """A record that cannot be used, with a reason (one of a few) and a detail of this record."""

    row_id: str
    reason: str
    detail: str = ""


Record = dict[str, Any] | Rejection
Records = Iterator[tuple[str, Record]]


def bad_byte(error: UnicodeDecodeError, offset: int) -> str:
    """Describe the byte that is not UTF-8 and its position, for messages."""
    return f"byte {offset + 1:,} is 0x{error.object[error.start]:02x} ({error.reason})"


def as_object(value: Any, row_id: str) -> Record:
    """Return a JSON value as a record; anything but an object is a Rejection."""
    if isinstance(value, dict):
        return value
    kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
    detail = f'{kind}, expected an object such as {{"prompt": ..., "completion": ...}}'
    return Rejection(row_id, NOT_AN_OBJECT, detail)
