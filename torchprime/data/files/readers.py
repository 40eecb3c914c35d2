"""Readers for one file: bytes become records with ids, by the format that its name gives.

A record is a dict, or a `Rejection` if only this record is broken (a truncated line, an item that
is no object); the caller counts rejections. A fault that also breaks the rest of the file (a
missing comma in an array, a damaged Parquet page, a truncated compressed file) is a `DataError`.

No file is ever held in memory whole. Lines are read one at a time and never beyond `MAX_ROW_BYTES`,
an array is decoded item by item in a window of text that moves along the file, and Parquet is read
in batches.

    name.jsonl .ndjson      one object a line                                   id name.jsonl:17
    name.json               an array of objects; an object with one list of     id name.json#17
                            them; else one object a line
    name.csv .tsv           a header line, then records; values are strings     id name.csv:17
    name.parquet .arrow     rows (arrow/read.py)                                id name.parquet#17

Each may be compressed (.gz .bz2 .xz .zst). Without a known extension the first byte decides.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from typing import IO, Any

from torchprime.data.files.arrow.read import read_arrow, read_parquet
from torchprime.data.files.json_text import JsonFault, JsonText
from torchprime.data.files.record import (
    BEYOND_PARSER,
    MALFORMED_JSON,
    MAX_ROW_BYTES,
    NOT_UTF8,
    TOO_LARGE,
    WRONG_FIELD_COUNT,
    Record,
    Records,
    Rejection,
    as_object,
    bad_byte,
)
from torchprime.data.files.splits import DEFAULT_SPLIT, SplitKey, same_split, unused_split
from torchprime.data.files.streams import READ_BYTES, UTF8_BOM, PlainStream
from torchprime.data.shared.notes import RowNotes
from torchprime.errors import DataError

LINE_EXTENSIONS = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (*LINE_EXTENSIONS, ".json", ".parquet", ".arrow", *DELIMITERS)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")

Open = Callable[[], IO[bytes]]


def read_records(
    name: str,
    open_file: Open,
    split: SplitKey = DEFAULT_SPLIT,
    notes: RowNotes | None = None,
) -> Records:
    """Stream (row_id, record) of one file.

    Args:
        name: decides the format and begins each id.
        open_file: called for each pass over the file (at most three).
        split: chooses among the lists of a JSON document that has several.
        notes: count what was noticed in the records.

    Raises:
        DataError: a structural fault, an unknown format, a split that is asked for and not there.
        OSError: a file that cannot be read.
    """
    extension, compression = split_name(name)

    def open_plain() -> PlainStream:
        return PlainStream(open_file(), compression)

    def open_buffered() -> io.BufferedReader:
        return io.BufferedReader(open_plain(), READ_BYTES)

    if extension in EXTENSIONS and extension != ".json" and split.asks:
        raise unused_split(split, name)
    if extension == ".parquet":
        return read_parquet(name, open_plain, notes)
    if extension == ".arrow":
        return read_arrow(name, open_plain, notes)
    if extension in DELIMITERS:
        return _read_table(name, open_buffered, DELIMITERS[extension])
    if extension in LINE_EXTENSIONS:
        return _read_lines(name, open_buffered)
    return _read_json(name, open_buffered, split, known=extension == ".json")


def split_name(name: str) -> tuple[str, str]:
    """Return the extensions for the format and for the compression, either may be ""."""
    stem, compression = name.lower(), ""
    for suffix in COMPRESSIONS:
        if stem.endswith(suffix):
            stem, compression = stem.removesuffix(suffix), suffix
            break
    base = stem.rsplit("/", 1)[-1]
    return "." + base.rsplit(".", 1)[-1] if "." in base else "", compression


def known_formats() -> str:
    """Return the extensions that can be read, for messages."""
    return f"{' '.join(EXTENSIONS)}, each also with {' '.join(COMPRESSIONS)}"


# Lines ------------------------------------------------------------------------------------------


def _read_lines(name: str, open_file: Callable[[], io.BufferedReader]) -> Records:
    with open_file() as stream:
        for number, raw in enumerate(_lines(stream), start=1):
            row_id = f"{name}:{number}"
            if raw is None:
                yield row_id, Rejection(row_id, TOO_LARGE)
            elif raw.strip():
                yield row_id, _parse_line(raw.rstrip(b"\r\n"), row_id)


def _lines(stream: io.BufferedReader) -> Iterator[bytes | None]:
    """Yield each line with its line break; None for one beyond the limit, never held whole."""
    first = True
    while raw := stream.readline(MAX_ROW_BYTES + 1):
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(READ_BYTES)
            yield None
        else:
            yield raw.removeprefix(UTF8_BOM) if first else raw
        first = False


def _parse_line(raw: bytes, row_id: str) -> Record:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Rejection(row_id, NOT_UTF8, bad_byte(error, error.start))
    except json.JSONDecodeError as error:
        return Rejection(row_id, MALFORMED_JSON, f"{error.msg}: column {error.colno}")
    except (ValueError, RecursionError) as error:  # too many digits or too deep nesting
        return Rejection(row_id, BEYOND_PARSER, str(error))
    return as_object(value, row_id)


# JSON -------------------------------------------------------------------------------------------


ONE_ROW, LINES = 1, 2  # the forms of a JSON file that begins with {, besides a list under a key


def _read_json(
    name: str, open_file: Callable[[], io.BufferedReader], split: SplitKey, known: bool
) -> Records:
    with open_file() as stream:
        first = _first_byte(stream)
    if not known and first not in b"{[":
        raise DataError(
            f"{name}: the format is unknown: its name ends in none of {known_formats()}, and it "
            f"does not begin like JSON. Rename or convert the file"
        )
    shape: int | str | None = LINES
    if first == b"[":
        shape = None
    elif first == b"{":
        shape = _shape_of_object(name, open_file, split)
    lists = [shape] if isinstance(shape, str) else []
    if split.asks and not (lists and same_split(split.name, lists)):
        raise unused_split(split, name, lists)
    if shape == LINES:
        yield from _read_lines(name, open_file)
        return
    with open_file() as stream:
        text = JsonText(name, stream)
        items = iter([text.value()]) if shape == ONE_ROW else _items_under(text, shape)
        for number, item in enumerate(items, start=1):
            row_id = f"{name}#{number}"
            yield row_id, as_object(item, row_id)


def _first_byte(stream: io.BufferedReader) -> bytes:
    """Return the first byte that is no space; b"" if there is none."""
    head = stream.read(READ_BYTES).removeprefix(UTF8_BOM).lstrip()
    while not head and (more := stream.read(READ_BYTES)):
        head = more.lstrip()
    return head[:1]


def _items_under(text: JsonText, key: int | str | None) -> Iterator[Any]:
    """Yield the items of the document's one array: the document itself, or the value of `key`."""
    if key is None:
        yield from text.items()
    else:
        for found in text.fields():
            if found == key and text.peek() == "[":
                yield from text.items()
            else:
                text.value()
    if text.peek():
        raise text.fault("extra data after the end")


def _shape_of_object(
    name: str, open_file: Callable[[], io.BufferedReader], split: SplitKey
) -> int | str:
    """Return the kind of a file that begins with {: LINES, ONE_ROW or the key of its list of rows.

    The first object is read to its end, one item at a time. If the file is JSON Lines, the first
    object is one line.
    """
    with open_file() as stream:
        text = JsonText(name, stream)
        text.peek()
        first_line = text.line()
        try:
            lists, is_conversation = _lists_of_objects(text)
        except JsonFault as fault:
            # The document is either broken or the first of many lines.
            if fault.line == first_line or _second_line_is_object(open_file):
                return LINES
            raise
        one_line = text.line() == first_line
        try:
            alone = not text.peek()
        except JsonFault:
            alone = False
        if not alone and not one_line:
            raise text.fault(
                "extra data after the first object, which spans several lines: one object a line "
                "or an array can be read"
            )
    if not alone:
        return LINES
    if is_conversation or not lists:
        return LINES if one_line else ONE_ROW
    if split.name is not None and (chosen := same_split(split.name, lists)):
        return chosen
    if len(lists) == 1:
        return lists[0]
    none = " is not set" if split.name is None else f"={split.name} is none of them"
    raise DataError(
        f"{name}: the rows are under several keys, {', '.join(lists)}, and {split.key}{none}. Set "
        f"{split.key} to one"
    )


def _lists_of_objects(text: JsonText) -> tuple[list[str], bool]:
    """Return the keys that hold a list of objects, and True if one holds a conversation's turns.

    An object with turns is itself a row.
    """
    lists, is_conversation = [], False
    for key in text.fields():
        if text.peek() != "[":
            text.value()
            continue
        first: Any = None
        for item in text.items():
            first = item if text.item == 1 else first
        text.item = 0
        if isinstance(first, dict):
            lists.append(key)
            is_conversation |= {"role", "content"} <= first.keys()
            is_conversation |= {"from", "value"} <= first.keys()
    return lists, is_conversation


def _second_line_is_object(open_file: Callable[[], io.BufferedReader]) -> bool:
    with open_file() as stream:
        lines = (raw for raw in _lines(stream) if raw is None or raw.strip())
        next(lines, None)
        second = next(lines, None)
    return second is not None and isinstance(_parse_line(second, ""), dict)


# CSV and TSV ------------------------------------------------------------------------------------


def _read_table(name: str, open_file: Callable[[], io.BufferedReader], delimiter: str) -> Records:
    # The csv module's limit of 128 KiB holds for the whole process, and a field may be longer.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with open_file() as stream:
        # strict: otherwise an unclosed quote takes the rest of the file as one value.
        reader = csv.reader(_text_lines(name, stream), delimiter=delimiter, strict=True)
        header: list[str] = []
        while True:
            row_id = f"{name}:{reader.line_num + 1}"
            try:
                values = next(reader, None)
            except csv.Error as error:
                raise DataError(
                    f"{row_id}: the record that starts here cannot be read: {error}. Put a value "
                    f'with a line break, a quote or the delimiter in quotes ("), a quote in it '
                    f'doubled ("")'
                ) from None
            if values is None:
                return
            if not values:  # a blank line
                continue
            if header:
                yield row_id, _as_record(header, values, row_id)
            else:
                header = _checked_header(values, row_id)


def _checked_header(names: list[str], row_id: str) -> list[str]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{row_id}: the header names {', '.join(map(repr, twice))} more than once. Give each "
            f"column its own name"
        )
    return names


def _as_record(header: list[str], values: list[str], row_id: str) -> Record:
    if len(values) != len(header):
        detail = f"{len(values)}, the header has {len(header)}"
        return Rejection(row_id, WRONG_FIELD_COUNT, detail)
    return {key: value or None for key, value in zip(header, values, strict=True)}


def _text_lines(name: str, stream: io.BufferedReader) -> Iterator[str]:
    for number, raw in enumerate(_lines(stream), start=1):
        if raw is None:
            raise DataError(
                f"{name}:{number}: the line is longer than {MAX_ROW_BYTES:,} bytes, the largest "
                f"row. Split the row, or take it out"
            )
        try:
            yield raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name}:{number}: not valid UTF-8: {bad_byte(error, error.start)} of the line. "
                f"Save the file as UTF-8"
            ) from None
