"""Arrow batches as the records that JSON Lines would have given: one converter per schema.

A typed column is read as what it says, not as what it is stored in: a JSON-typed column gives what
its text says, a UUID its text, a map an object (docs/data.md lists every type). A struct has all
fields of the schema, so the fields a row did not have stand there as nulls. Those are taken out and
counted; columns keep their nulls, list items do too, and so does a null that JSON text says.

Whole columns are converted at a time, children before parents. Only where that fails is a batch
converted row by row, so that a value that cannot be read costs one row.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any, NamedTuple
from uuid import UUID

import numpy as np
import pyarrow as pa

from torchprime.data.records import (
    BEYOND_PARSER,
    MALFORMED_JSON,
    NOT_UTF8,
    OUT_OF_RANGE,
    bad_byte,
)
from torchprime.errors import DataError

FILLED_IN = "null fields that the file's schema filled in, taken out"
BY_STORAGE = "values of a type that is not known, read as they are stored"

FLOAT_DIGITS = 15  # decimal digits that a float keeps
INTERVAL = ("months", "days", "nanoseconds")
UNITS = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}  # of a second
# Columns of turns that the datasets library's Sequence stores as one object of lists.
LISTS_OF_OBJECTS = ("messages", "conversations", "tools")
TURN_KEYS = ({"role", "content"}, {"from", "value"})
# Among them a time zone that this machine does not know.
_CONVERSION_ERRORS = (pa.ArrowException, ValueError, OverflowError, LookupError)


class Column(NamedTuple):
    """The values of an array, and per value how many filled-in nulls were taken out (or None)."""

    values: list[Any]
    filled: np.ndarray | None = None


Convert = Callable[[Any], Column]
Path = tuple[str, ...]  # names from the column down; items of a list have the list's


class BadValue(Exception):
    """A value that cannot be read; the reason and detail of a rejection."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


class ArrowRows:
    """Converts the record batches of one schema.

    Raises DataError for a schema whose names occur twice.

    Attributes:
        by_storage: the columns, as paths, of an extension type that is not known.
    """

    def __init__(self, name: str, schema: pa.Schema) -> None:
        _check_names(name, schema.names, "columns")
        self._name = name
        self.by_storage: list[str] = []
        self._columns = [(field.name, self._converter(field, (field.name,))) for field in schema]

    def records(self, batch: Any) -> tuple[Sequence[dict[str, Any] | BadValue], Sequence[int]]:
        """The rows of a batch, and the number of filled-in nulls taken out of each, if of any."""
        try:
            columns = [convert(batch.column(i)) for i, (_, convert) in enumerate(self._columns)]
        except (*_CONVERSION_ERRORS, BadValue):
            if batch.num_rows == 1:
                return [self._bad_value(batch)], ()
            return self._one_by_one(batch)
        rows = _objects(batch.num_rows)
        for (name, _), (values, _) in zip(self._columns, columns, strict=True):
            _put(rows, name, values)
        filled = _total([column.filled for column in columns])
        return rows, () if filled is None else filled.tolist()

    def _one_by_one(self, batch: Any) -> tuple[list[dict[str, Any] | BadValue], list[int]]:
        rows: list[dict[str, Any] | BadValue] = []
        counts: list[int] = []
        for i in range(batch.num_rows):
            row, count = self.records(batch.slice(i, 1))
            rows += row
            counts += count or [0]
        return rows, counts

    def _bad_value(self, row: Any) -> BadValue:
        """Why the one row of a batch cannot be converted."""
        for i, (name, convert) in enumerate(self._columns):
            try:
                convert(row.column(i))
            except BadValue as bad:
                return BadValue(bad.reason, f"column {name}: {bad.detail}")
            except _CONVERSION_ERRORS as error:
                return _bad_text(row.column(i)) or BadValue(OUT_OF_RANGE, f"column {name}: {error}")
        raise AssertionError("each column can be converted")

    # The converter of a type -------------------------------------------------------------------

    def _converter(self, field: pa.Field, path: Path) -> Convert:
        kind, is_ = field.type, pa.types
        extension = _extension_of(field)
        if extension:
            return self._extension(extension, field, path)
        if is_.is_dictionary(kind):
            return _dictionary(self._converter(field.with_type(kind.value_type), path))
        if is_.is_run_end_encoded(kind):
            return _run_ends(self._converter(field.with_type(kind.value_type), path))
        if is_.is_union(kind):
            return _union([self._converter(kind.field(i), path) for i in range(kind.num_fields)])
        if is_.is_struct(kind):
            return self._struct(kind, path)
        if is_.is_map(kind):
            return _map(*(self._converter(f, path) for f in (kind.key_field, kind.item_field)))
        if is_.is_fixed_size_list(kind):
            return _fixed_list(self._converter(kind.value_field, path), kind.list_size)
        if is_.is_list(kind) or is_.is_large_list(kind):
            return _list(self._converter(kind.value_field, path))
        if is_.is_list_view(kind) or is_.is_large_list_view(kind):
            return _list_view(self._converter(kind.value_field, path))
        return _leaf(kind)

    def _extension(self, name: str, field: pa.Field, path: Path) -> Convert:
        kind = field.type
        stored = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        # without the metadata, which would say the same again
        convert = self._converter(pa.field(field.name, stored), path)
        if name == "arrow.json":
            convert = _each(convert, _parsed)
        elif name == "arrow.uuid":
            convert = _each(_plain, lambda raw: str(UUID(bytes=raw)))
        elif name == "arrow.bool8":
            convert = _each(convert, bool)
        elif not name.startswith("datasets."):  # its arrays are lists of lists
            self.by_storage.append(f"{'.'.join(path)} ({name})")
        if kind is stored:
            return convert
        return lambda array: convert(array.storage)

    def _struct(self, kind: Any, path: Path) -> Convert:
        fields = [kind.field(i) for i in range(kind.num_fields)]
        names = [field.name for field in fields]
        _check_names(self._name, names, f"fields of {'.'.join(path)}")
        children = [self._converter(field, (*path, field.name)) for field in fields]
        spoken = {i for i, field in enumerate(fields) if _says_null(field)}
        convert = _struct(names, children, spoken)
        return _unzipped(convert) if _is_lists_of_turns(kind, path) else convert


def _check_names(name: str, names: Sequence[str], what: str) -> None:
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise DataError(
            f"{name}: two {what} have the same name: {', '.join(map(repr, twice))}. Give each its "
            f"own name"
        )


def _extension_of(field: pa.Field) -> str:
    """The name of an extension type, also of one that this pyarrow does not know."""
    if isinstance(field.type, pa.BaseExtensionType):
        return field.type.extension_name
    said = (field.metadata or {}).get(b"ARROW:extension:name", b"")
    return said.decode("utf-8", "replace")


def _says_null(field: pa.Field) -> bool:
    """True for JSON text, encoded or not: there a null may be content."""
    kind = field.type
    while pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    return _extension_of(field.with_type(kind)) == "arrow.json"


def _is_lists_of_turns(kind: Any, path: Path) -> bool:
    """True for one object of lists that stands for a list of objects.

    Only whole columns and the calls of a turn are: elsewhere such an object is what it looks like.
    """
    types = [kind.field(i).type for i in range(kind.num_fields)]
    if not types or not all(map(_is_list, types)):
        return False
    names = {kind.field(i).name for i in range(kind.num_fields)}
    if len(path) == 1:
        return path[0] in LISTS_OF_OBJECTS or any(keys <= names for keys in TURN_KEYS)
    return len(path) == 2 and path[1] == "tool_calls"


def _is_list(kind: Any) -> bool:
    is_ = pa.types
    tests = (is_.is_list, is_.is_large_list, is_.is_fixed_size_list)
    return any(test(kind) for test in (*tests, is_.is_list_view, is_.is_large_list_view))


# Nested types -----------------------------------------------------------------------------------


def _struct(names: list[str], children: list[Convert], spoken: set[int]) -> Convert:
    """Objects without their null fields. `spoken`: children of which a None is content."""

    def convert_valid(array: Any) -> Column:
        rows, filled, gaps = _objects(len(array)), [], False
        for i, (name, child) in enumerate(zip(names, children, strict=True)):
            field = array.field(i)
            if not _may_have_gaps(field):
                values, inner = child(field)
                _put(rows, name, values)
                filled.append(inner)
                continue
            places, (values, inner) = _present(field, child)
            filled.append(_scattered(inner, places, len(array)))
            for place, value in zip(places, values, strict=True):
                if value is not None or i in spoken:
                    rows[place][name] = value
            gaps = True
        if gaps:
            lengths = np.fromiter(map(len, rows), np.int64, len(rows))
            filled.append(len(names) - lengths)
        return Column(rows, _total(filled))

    def convert(array: Any) -> Column:
        if not array.null_count:
            return convert_valid(array)
        places, (values, filled) = _present(array, convert_valid)
        found: list[Any] = [None] * len(array)
        for place, value in zip(places, values, strict=True):
            found[place] = value
        return Column(found, _scattered(filled, places, len(array)))

    return convert


def _may_have_gaps(array: Any) -> bool:
    """True for nulls, and for types that have them without counting them."""
    is_, kind = pa.types, array.type
    loose = (is_.is_dictionary(kind), is_.is_run_end_encoded(kind), is_.is_union(kind))
    return array.null_count > 0 or any(loose)


def _present(array: Any, convert: Convert) -> tuple[Sequence[int], Column]:
    """The places of the values that are not null, and these: in a union schema few are there."""
    if not array.null_count:
        return range(len(array)), convert(array)
    if array.null_count == len(array):
        return (), Column([])
    places = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    try:
        return places.tolist(), convert(array.drop_null())
    except pa.ArrowNotImplementedError:  # of a type that cannot be filtered
        values, filled = convert(array)
        kept = [values[place] for place in places.tolist()]
        return places.tolist(), Column(kept, None if filled is None else filled[places])


def _scattered(filled: np.ndarray | None, places: Sequence[int], length: int) -> np.ndarray | None:
    if filled is None or len(places) == length:
        return filled
    counts = np.zeros(length, np.int64)
    counts[places] = filled
    return counts


def _objects(number: int) -> list[dict[str, Any]]:
    return [{} for _ in range(number)]


def _put(rows: list[dict[str, Any]], name: str, values: list[Any]) -> None:
    """Give each row its value. (Half the time of making each row at once.)"""
    for row, value in zip(rows, values, strict=True):
        row[name] = value


def _total(counts: list[np.ndarray | None]) -> np.ndarray | None:
    found = [count for count in counts if count is not None]
    return sum(found[1:], found[0]) if found else None


def _where_valid(array: Any, values: list[Any], filled: np.ndarray | None = None) -> Column:
    """None in place of what lies under a null, whose counts do not count."""
    if not array.null_count:
        return Column(values, filled)
    valid = array.is_valid().to_numpy(zero_copy_only=False)
    for i in np.flatnonzero(~valid).tolist():
        values[i] = None
    return Column(values, None if filled is None else np.where(valid, filled, 0))


def _list(child: Convert) -> Convert:
    def convert(array: Any) -> Column:
        offsets = array.offsets.to_numpy()
        first, last = (offsets[0], offsets[-1]) if len(offsets) else (0, 0)
        column = child(array.values.slice(int(first), int(last - first)))
        return _lists(array, column, offsets[:-1] - first, offsets[1:] - first)

    return convert


def _list_view(child: Convert) -> Convert:
    def convert(array: Any) -> Column:
        # Where a view is null its place means nothing.
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        starts = np.where(valid, array.offsets.to_numpy(zero_copy_only=False), 0)
        sizes = np.where(valid, array.sizes.to_numpy(zero_copy_only=False), 0)
        used = sizes > 0
        first = starts[used].min() if used.any() else 0
        last = (starts + sizes)[used].max() if used.any() else 0
        column = child(array.values.slice(int(first), int(last - first)))
        starts = np.where(used, starts - first, 0)
        return _lists(array, column, starts, starts + sizes)

    return convert


def _fixed_list(child: Convert, size: int) -> Convert:
    def convert(array: Any) -> Column:
        column = child(array.values.slice(array.offset * size, len(array) * size))
        starts = np.arange(len(array), dtype=np.int64) * size
        return _lists(array, column, starts, starts + size)

    return convert


def _lists(array: Any, items: Column, starts: np.ndarray, ends: np.ndarray) -> Column:
    """Pieces of `items`; an item that is null stays."""
    bounds = zip(starts.tolist(), ends.tolist(), strict=True)
    lists = [items.values[start:end] for start, end in bounds]
    filled = None
    if items.filled is not None:
        before = np.concatenate(([0], np.cumsum(items.filled)))
        filled = before[ends] - before[starts]
    return _where_valid(array, lists, filled)


def _map(key: Convert, item: Convert) -> Convert:
    """Objects; a null value of a map was written by somebody, and stays."""

    def convert(array: Any) -> Column:
        offsets = array.offsets.to_numpy()
        first, last = (offsets[0], offsets[-1]) if len(offsets) else (0, 0)
        keys = key(array.keys.slice(int(first), int(last - first))).values
        values, filled = item(array.items.slice(int(first), int(last - first)))
        pairs = Column(list(zip(keys, values, strict=True)), filled)
        lists, counts = _lists(array, pairs, offsets[:-1] - first, offsets[1:] - first)
        return Column([None if each is None else dict(each) for each in lists], counts)

    return convert


def _dictionary(child: Convert) -> Convert:
    def convert(array: Any) -> Column:
        dictionary, indices = array.dictionary, array.indices
        if len(dictionary) > len(array):  # a slice, which needs but a few of them
            try:
                return child(dictionary.take(indices))
            except pa.ArrowNotImplementedError:  # of a type that cannot be taken from
                pass
        return _taken(child(dictionary), indices)

    return convert


def _run_ends(child: Convert) -> Convert:
    def convert(array: Any) -> Column:
        places = np.arange(array.offset, array.offset + len(array))
        runs = np.searchsorted(array.run_ends.to_numpy(), places, side="right")
        return _taken(child(array.values), pa.array(runs))

    return convert


def _taken(column: Column, indices: Any) -> Column:
    present = indices.fill_null(0).to_numpy() if len(column.values) else np.empty(0, np.int64)
    values = [column.values[i] for i in present.tolist()] or [None] * len(indices)
    filled = None if column.filled is None else column.filled[present]
    return _where_valid(indices, values, filled)


def _union(children: list[Convert]) -> Convert:
    """Value by value: such columns are rare, and their children's buffers lie each in its way."""

    def convert(array: Any) -> Column:
        found = [
            children[scalar.type_code](pa.repeat(scalar.value, 1))
            if scalar.is_valid
            else Column([None])
            for scalar in array
        ]
        filled = [0 if each.filled is None else int(each.filled[0]) for each in found]
        counts = np.array(filled, np.int64) if any(filled) else None
        return Column([each.values[0] for each in found], counts)

    return convert


def _unzipped(convert: Convert) -> Convert:
    """A list of objects of one object of lists; it stays what it is if they are not of a length."""

    def convert_turns(array: Any) -> Column:
        values, filled = convert(array)
        counts = np.zeros(len(values), np.int64) if filled is None else filled
        turned = list(values)
        for i, value in enumerate(values):
            if value and len(set(map(len, value.values()))) == 1:
                turns = zip(*value.values(), strict=True)
                pairs = [[(k, v) for k, v in zip(value, turn, strict=True)] for turn in turns]
                turned[i] = [{k: v for k, v in turn if v is not None} for turn in pairs]
                counts[i] += sum(map(len, pairs)) - sum(map(len, turned[i]))
        return Column(turned, counts)

    return convert_turns


# Other types ------------------------------------------------------------------------------------


def _leaf(kind: Any) -> Convert:
    is_ = pa.types
    if is_.is_null(kind):
        return lambda array: Column([None] * len(array))
    if is_.is_string(kind) or is_.is_large_string(kind) or is_.is_string_view(kind):
        return lambda array: Column(array.to_numpy(zero_copy_only=False).tolist())
    if is_.is_integer(kind) or is_.is_float32(kind) or is_.is_float64(kind):
        return _numbers
    if is_.is_decimal(kind):
        return _each(_plain, _decimal_form(kind))
    if is_.is_timestamp(kind):
        return _each(_ticks, _moment_form(kind)) if kind.unit == "ns" else _each(_plain, _iso)
    if is_.is_time(kind):
        return _each(_ticks, _time_form(kind.unit))
    if is_.is_duration(kind):
        return _each(_ticks, _seconds_form(kind.unit))
    if is_.is_date(kind):
        return _each(_plain, _iso)
    if is_.is_interval(kind):
        return _each(_plain, lambda value: dict(zip(INTERVAL, value, strict=True)))
    if is_.is_boolean(kind) or is_.is_float16(kind):
        return _plain
    return _each(_plain, _text_or_bytes)  # all kinds of binary


def _plain(array: Any) -> Column:
    return Column(array.to_pylist())


def _numbers(array: Any) -> Column:
    return _where_valid(array, array.fill_null(0).to_numpy().tolist())


def _ticks(array: Any) -> Column:
    """Times as whole numbers of their unit: Python's own types have no nanoseconds."""
    wide = array.type.bit_width == 64
    return _plain(array.cast(pa.int64() if wide else pa.int32()))


def _each(convert: Convert, form: Callable[[Any], Any]) -> Convert:
    """The values through `form`, nulls apart."""

    def convert_each(array: Any) -> Column:
        return Column([None if v is None else form(v) for v in convert(array).values])

    return convert_each


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise BadValue(MALFORMED_JSON, f"{error.msg}: column {error.colno}") from None
    except (ValueError, RecursionError) as error:  # numbers or nesting
        raise BadValue(BEYOND_PARSER, str(error)) from None


def _text_or_bytes(raw: bytes) -> str | bytes:
    """Some writers store text without saying that it is text. Other bytes are no value of JSON:
    they stay bytes, which whatever reads the column refuses."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw


def _decimal_form(kind: Any) -> Callable[[Decimal], Any]:
    """A number, or the digits as text where a float would not keep them all."""
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


def _bad_text(array: Any) -> BadValue | None:
    try:
        array.to_pylist()
    except UnicodeDecodeError as error:
        return BadValue(NOT_UTF8, bad_byte(error, error.start))
    except Exception:  # something else is wrong with it
        return None
    return None
