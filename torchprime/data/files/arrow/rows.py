"""Conversion of Arrow batches to the records of equivalent JSON Lines, one converter per schema.

A typed column is read by its logical type, not by its storage type: a JSON-typed column gives the
parsed value, a UUID its text, a map an object (docs/data.md lists every type). A struct has all
fields of the schema, so fields that a row did not have are stored as nulls. Those are removed and
counted. Nulls of columns and list items are kept, and so are nulls in JSON text.

Whole columns are converted at a time, children before parents. If that fails, the batch is
converted row by row, so that a value that cannot be read costs only one row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pyarrow as pa

from torchprime.data.files.arrow.nested import (
    dictionaries,
    empty_objects,
    fixed_lists,
    list_views,
    lists,
    maps,
    objects,
    objects_of_lists,
    put,
    run_ends,
    total,
    unions,
)
from torchprime.data.files.arrow.values import (
    BadValue,
    Convert,
    each_value,
    leaf,
    parsed_json,
    plain,
    unreadable_text,
)
from torchprime.data.files.record import OUT_OF_RANGE
from torchprime.errors import DataError

FILLED_IN = "null fields that the file's schema filled in, taken out"
BY_STORAGE = "values of a type that is not known, read as they are stored"

# Columns of turns that the datasets library's Sequence stores as one object of lists.
LISTS_OF_OBJECTS = ("messages", "conversations", "tools")
TURN_KEYS = ({"role", "content"}, {"from", "value"})
# A KeyError means a time zone that this machine does not know.
CONVERSION_ERRORS = (pa.ArrowException, ValueError, OverflowError, KeyError)

Path = tuple[str, ...]  # names from the column down; list items have the name of the list


class ArrowRows:
    """A converter for the record batches of one schema.

    Raises DataError if a name occurs twice in the schema.

    Attributes:
        by_storage: paths of the columns whose extension type is unknown.
    """

    def __init__(self, name: str, schema: pa.Schema) -> None:
        _check_names(name, schema.names, "columns")
        self._name = name
        self.by_storage: list[str] = []
        self._columns = [(field.name, self._converter(field, (field.name,))) for field in schema]

    def records(self, batch: Any) -> tuple[Sequence[dict[str, Any] | BadValue], Sequence[int]]:
        """Return the rows of a batch and the number of schema nulls removed from each, if any."""
        try:
            columns = [convert(batch.column(i)) for i, (_, convert) in enumerate(self._columns)]
        except (*CONVERSION_ERRORS, BadValue):
            if batch.num_rows == 1:
                return [self._bad_value(batch)], ()
            return self._one_by_one(batch)
        rows = empty_objects(batch.num_rows)
        for (name, _), (values, _) in zip(self._columns, columns, strict=True):
            put(rows, name, values)
        filled = total([column.filled for column in columns])
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
        """Return the reason why the only row of a batch cannot be converted."""
        for i, (name, convert) in enumerate(self._columns):
            try:
                convert(row.column(i))
            except BadValue as bad:
                return BadValue(bad.reason, f"column {name}: {bad.detail}")
            except CONVERSION_ERRORS as error:
                found = unreadable_text(row.column(i))
                return found or BadValue(OUT_OF_RANGE, f"column {name}: {error}")
        raise AssertionError("each column can be converted")

    # Converters by type -------------------------------------------------------------------------

    def _converter(self, field: pa.Field, path: Path) -> Convert:
        kind, is_ = field.type, pa.types
        extension = _extension_of(field)
        if extension:
            return self._extension(extension, field, path)
        if is_.is_dictionary(kind):
            return dictionaries(self._converter(field.with_type(kind.value_type), path))
        if is_.is_run_end_encoded(kind):
            return run_ends(self._converter(field.with_type(kind.value_type), path))
        if is_.is_union(kind):
            return unions([self._converter(kind.field(i), path) for i in range(kind.num_fields)])
        if is_.is_struct(kind):
            return self._struct(kind, path)
        if is_.is_map(kind):
            return maps(*(self._converter(f, path) for f in (kind.key_field, kind.item_field)))
        if is_.is_fixed_size_list(kind):
            return fixed_lists(self._converter(kind.value_field, path), kind.list_size)
        if is_.is_list(kind) or is_.is_large_list(kind):
            return lists(self._converter(kind.value_field, path))
        if is_.is_list_view(kind) or is_.is_large_list_view(kind):
            return list_views(self._converter(kind.value_field, path))
        return leaf(kind)

    def _extension(self, name: str, field: pa.Field, path: Path) -> Convert:
        kind = field.type
        stored = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
        # without the metadata, which would repeat the name
        convert = self._converter(pa.field(field.name, stored), path)
        if name == "arrow.json":
            convert = each_value(convert, parsed_json)
        elif name == "arrow.uuid":
            convert = each_value(plain, lambda raw: str(UUID(bytes=raw)))
        elif name == "arrow.bool8":
            convert = each_value(convert, bool)
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
        convert = objects(names, children, spoken)
        return objects_of_lists(convert) if _is_lists_of_turns(kind, path) else convert


def _check_names(name: str, names: Sequence[str], what: str) -> None:
    twice = sorted({each for each in names if names.count(each) > 1})
    if twice:
        raise DataError(
            f"{name}: two {what} have the same name: {', '.join(map(repr, twice))}. Give each its "
            f"own name"
        )


def _extension_of(field: pa.Field) -> str:
    """Return the name of an extension type, even if this pyarrow does not know it."""
    if isinstance(field.type, pa.BaseExtensionType):
        return field.type.extension_name
    said = (field.metadata or {}).get(b"ARROW:extension:name", b"")
    return said.decode("utf-8", "replace")


def _says_null(field: pa.Field) -> bool:
    """Return True for JSON text, encoded or not: its nulls may be content."""
    kind = field.type
    while pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind):
        kind = kind.value_type
    return _extension_of(field.with_type(kind)) == "arrow.json"


def _is_lists_of_turns(kind: Any, path: Path) -> bool:
    """Return True for one object of lists that stands for a list of objects.

    This applies only to whole columns and to the calls of a turn; elsewhere such an object is data.
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
