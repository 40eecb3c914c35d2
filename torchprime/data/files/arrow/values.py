"""Converters for Arrow types without children, to lists of JSON values.

arrow/rows.py builds objects, lists and records from them; docs/data.md has the table of types.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from torchprime.data.files.record import BEYOND_PARSER, MALFORMED_JSON, NOT_UTF8, bad_byte

FLOAT_DIGITS = 15  # decimal digits that a float represents exactly
INTERVAL = ("months", "days", "nanoseconds")
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # per second


class Column(NamedTuple):
    """The values of an array, and the number of schema nulls removed from each value (or None)."""

    values: list[Any]
    filled: np.ndarray | None = None


Convert = Callable[[Any], Column]


class BadValue(Exception):
    """A value that cannot be read; the reason and detail of a rejection."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def where_valid(array: Any, values: list[Any], filled: np.ndarray | None = None) -> Column:
    """Replace values under a null by None, and their counts by 0."""
    if not array.null_count:
        return Column(values, filled)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    for i in np.flatnonzero(~valid).tolist():
        values[i] = None
    return Column(values, None if filled is None else np.where(valid, filled, 0))


def leaf(kind: Any) -> Convert:
    """Return the converter of a type without children."""
    is_ = pa.types
    if is_.is_null(kind):
        return lambda array: Column([None] * len(array))
    if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
        return lambda array: Column(array.to_numpy(zero_copy_only=False).tolist())
    if is_.is_integer(kind) or is_.is_float32(kind) or is_.is_float64(kind):
        return _numbers
    if is_.is_decimal(kind):
        return each_value(plain, _decimal_form(kind))
    if is_.is_timestamp(kind) and kind.unit == "ns":
        return each_value(_ticks, _moment_form(kind))
    if is_.is_timestamp(kind) or is_.is_date(kind):
        return each_value(plain, _iso)
    if is_.is_time(kind):
        return each_value(_ticks, _time_form(kind.unit))
    if is_.is_duration(kind):
        return each_value(_ticks, _seconds_form(kind.unit))
    if is_.is_interval(kind):
        return each_value(plain, lambda value: dict(zip(INTERVAL, value, strict=True)))
    if is_.is_boolean(kind) or is_.is_float16(kind):
        return plain
    return each_value(plain, _text_or_bytes)  # all kinds of binary


def plain(array: Any) -> Column:
    """Return the values as pyarrow gives them."""
    return Column(array.to_pylist())


def _numbers(array: Any) -> Column:
    return where_valid(array, array.fill_null(0).to_numpy().tolist())


def _ticks(array: Any) -> Column:
    """Return times as integers of their unit: Python's own types have no nanoseconds."""
    wide = array.type.bit_width == 64
    return plain(array.cast(pa.int64() if wide else pa.int32()))


def each_value(convert: Convert, form: Callable[[Any], Any]) -> Convert:
    """Apply `form` to each value that is not null."""

    def convert_each(array: Any) -> Column:
        return Column([None if v is None else form(v) for v in convert(array).values])

    return convert_each


def parsed_json(text: str) -> Any:
    """Parse JSON text; invalid text becomes a BadValue."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadValue(MALFORMED_JSON, f"{error.msg}: column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # too many digits or too deep nesting
        raise BadValue(BEYOND_PARSER, str(error)) from None


def _text_or_bytes(raw: bytes) -> str | bytes:
    """Return text for bytes that are UTF-8, because some writers store text without its type.

    Other bytes are no JSON value: they stay bytes, and the reader of the column rejects them.
    """
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _decimal_form(kind: Any) -> Callable[[Decimal], Any]:
    """Return a number, or the digits as text if a float would lose some of them."""
    if kind.scale <= 0:
        return int
    return float if kind.precision <= FLOAT_DIGITS else lambda value: f"{value:f}"


def _iso(value: Any) -> str:
    return value.isoformat()


def _moment_form(kind: Any) -> Callable[[int], str]:
    def form(ticks: int) -> str:
        micro, rest = divmod(ticks, 1000)
        moment = pa.scalar(micro, pa.timestamp("us", kind.tz)).as_py()
        if not rest:
            return moment.isoformat()
        text = moment.isoformat(timespec="microseconds")
        return f"{text[:26]}{rest:03}{text[26:]}"

    return form


def _time_form(unit: str) -> Callable[[int], str]:
    def form(ticks: int) -> str:
        seconds, rest = divmod(ticks, UNITS[unit])
        text = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        return f"{text}.{rest * (UNITS['ns'] // UNITS[unit]):09}".rstrip("0") if rest else text

    return form


def _seconds_form(unit: str) -> Callable[[int], int | float]:
    def form(ticks: int) -> int | float:
        whole, rest = divmod(ticks, UNITS[unit])
        return ticks / UNITS[unit] if rest else whole

    return form


def unreadable_text(array: Any) -> BadValue | None:
    """Describe the first byte that is not UTF-8 in an array of text, if there is one."""
    try:
        array.to_pylist()
    except UnicodeDecodeError as error:
        return BadValue(NOT_UTF8, bad_byte(error, error.start))
    except Exception:  # another fault
        return None
    return None
