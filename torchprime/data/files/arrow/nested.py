"""Converters for nested Arrow types: structs, lists, maps, unions and encoded arrays.

Each function builds the converter of a type from the converters of its children.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from torchprime.data.files.arrow.values import Column, Convert, where_valid


def objects(names: list[str], children: list[Convert], spoken: set[int]) -> Convert:
    """Convert structs to objects without null fields; children in `spoken` keep None as content."""

    def convert_valid(array: Any) -> Column:
        rows, filled, gaps = empty_objects(len(array)), [], False
        for i, (name, child) in enumerate(zip(names, children, strict=True)):
            field = array.field(i)
            if not _may_have_gaps(field):
                values, inner = child(field)
                put(rows, name, values)
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
        return Column(rows, total(filled))

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
    """Return True for arrays with nulls, and for types whose null count omits some nulls."""
    is_, kind = pa.types, array.type
    loose = (is_.is_dictionary(kind), is_.is_run_end_encoded(kind), is_.is_union(kind))
    return array.null_count > 0 or any(loose)


def _present(array: Any, convert: Convert) -> tuple[Sequence[int], Column]:
    """Return the indices and values that are not null; in a union schema these are few."""
    if not array.null_count:
        return range(len(array)), convert(array)
    if array.null_count == len(array):
        return (), Column([])
    places = np.flatnonzero(array.is_valid().to_numpy(zero_copy_only=False))
    try:
        return places.tolist(), convert(array.drop_null())
    except pa.ArrowNotImplementedError:  # for a type that cannot be filtered
        values, filled = convert(array)
        kept = [values[place] for place in places.tolist()]
        return places.tolist(), Column(kept, None if filled is None else filled[places])


def _scattered(filled: np.ndarray | None, places: Sequence[int], length: int) -> np.ndarray | None:
    if filled is None or len(places) == length:
        return filled
    counts = np.zeros(length, np.int64)
    counts[places] = filled
    return counts


def empty_objects(number: int) -> list[dict[str, Any]]:
    """Return empty objects for `put` to fill."""
    return [{} for _ in range(number)]


def put(rows: list[dict[str, Any]], name: str, values: list[Any]) -> None:
    """Set one key in every row, in half the time of building row by row."""
    for row, value in zip(rows, values, strict=True):
        row[name] = value


def total(counts: list[np.ndarray | None]) -> np.ndarray | None:
    """Return the sum per value; None stands for zeros."""
    found = [count for count in counts if count is not None]
    return sum(found[1:], found[0]) if found else None


def lists(child: Convert) -> Convert:
    """Convert lists with offsets of any size."""

    def convert(array: Any) -> Column:
        offsets = array.offsets.to_numpy()
        first, last = (offsets[0], offsets[-1]) if len(offsets) else (0, 0)
        column = child(array.values.slice(int(first), int(last - first)))
        return _pieces(array, column, offsets[:-1] - first, offsets[1:] - first)

    return convert


def list_views(child: Convert) -> Convert:
    """Convert lists whose items lie anywhere. (Casting a slice loses items in pyarrow 26.)"""

    def convert(array: Any) -> Column:
        # The offset and size of a null view are undefined.
        valid = array.is_valid().to_numpy(zero_copy_only=False)
        starts = np.where(valid, array.offsets.to_numpy(zero_copy_only=False), 0)
        sizes = np.where(valid, array.sizes.to_numpy(zero_copy_only=False), 0)
        used = sizes > 0
        first = starts[used].min() if used.any() else 0
        last = (starts + sizes)[used].max() if used.any() else 0
        column = child(array.values.slice(int(first), int(last - first)))
        starts = np.where(used, starts - first, 0)
        return _pieces(array, column, starts, starts + sizes)

    return convert


def fixed_lists(child: Convert, size: int) -> Convert:
    """Convert lists of one fixed length."""

    def convert(array: Any) -> Column:
        column = child(array.values.slice(array.offset * size, len(array) * size))
        starts = np.arange(len(array), dtype=np.int64) * size
        return _pieces(array, column, starts, starts + size)

    return convert


def _pieces(array: Any, items: Column, starts: np.ndarray, ends: np.ndarray) -> Column:
    """Return slices of `items`; null items stay."""
    bounds = zip(starts.tolist(), ends.tolist(), strict=True)
    found = [items.values[start:end] for start, end in bounds]
    filled = None
    if items.filled is not None:
        before = np.concatenate(([0], np.cumsum(items.filled)))
        filled = before[ends] - before[starts]
    return where_valid(array, found, filled)


def maps(key: Convert, item: Convert) -> Convert:
    """Convert maps to objects; a null map value was written explicitly, so it stays.

    If keys are objects or lists, return a list of objects with `key` and `value`, as Arrow stores
    it.
    """

    def convert(array: Any) -> Column:
        offsets = array.offsets.to_numpy()
        first, last = (offsets[0], offsets[-1]) if len(offsets) else (0, 0)
        keys = key(array.keys.slice(int(first), int(last - first))).values
        values, filled = item(array.items.slice(int(first), int(last - first)))
        pairs = Column(list(zip(keys, values, strict=True)), filled)
        found, counts = _pieces(array, pairs, offsets[:-1] - first, offsets[1:] - first)
        return Column([None if each is None else _object(each) for each in found], counts)

    return convert


def _object(pairs: list[tuple[Any, Any]]) -> Any:
    try:
        return dict(pairs)
    except TypeError:  # not a valid key of a JSON object
        return [{"key": key, "value": value} for key, value in pairs]


def dictionaries(child: Convert) -> Convert:
    """Convert dictionary-encoded values; `child` converts the dictionary itself."""

    def convert(array: Any) -> Column:
        dictionary, indices = array.dictionary, array.indices
        if len(dictionary) > len(array):  # a slice, which needs only a few of them
            try:
                return child(dictionary.take(indices))
            except pa.ArrowNotImplementedError:  # for a type that `take` does not support
                pass
        return _taken(child(dictionary), indices)

    return convert


def run_ends(child: Convert) -> Convert:
    """Convert run-end encoded values: each value is stored once with the end of its run."""

    def convert(array: Any) -> Column:
        places = np.arange(array.offset, array.offset + len(array))
        runs = np.searchsorted(array.run_ends.to_numpy(), places, side="right")
        return _taken(child(array.values), pa.array(runs))

    return convert


def _taken(column: Column, indices: Any) -> Column:
    present = indices.fill_null(0).to_numpy() if len(column.values) else np.empty(0, np.int64)
    values = [column.values[i] for i in present.tolist()] or [None] * len(indices)
    filled = None if column.filled is None else column.filled[present]
    return where_valid(indices, values, filled)


def unions(children: list[Convert]) -> Convert:
    """Convert unions value by value: such columns are rare, and each child has its own layout."""

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


def objects_of_lists(convert: Convert) -> Convert:
    """Turn an object of lists into a list of objects; keep it if the lengths differ."""

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
