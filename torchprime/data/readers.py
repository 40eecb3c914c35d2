"""What is in one file: its bytes, by the format its name says, become records with their ids.

A record is a dict, or a `Rejection` where only this record is broken (a line cut in half, an item
that is no object): the caller counts those. What breaks the rest of the file too (a comma missing
in an array, a damaged Parquet page, a compressed file that ends too soon) is a `DataError`.

No file is ever held whole. Lines are read one at a time and never beyond `MAX_ROW_BYTES`, an array
is decoded item by item in a window of text that moves along the file, Parquet comes in batches.

    name.jsonl .ndjson      one object a line                                   id name.jsonl:17
    name.json               an array of objects; an object with one list of     id name.json#17
                            them; else one object a line
    name.csv .tsv           a header line, then records; values are strings     id name.csv:17
    name.parquet            rows                                                id name.parquet#17

Each may be compressed (.gz .bz2 .xz .zst). A name that says nothing goes by its first byte.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import zstandard

from torchprime.errors import DataError

MAX_ROW_BYTES = 64 * 2**20  # a longer row is a mistake in the file, not a row
READ_BYTES = 64 * 2**10  # what is asked of a file at a time
BATCH_BYTES = 8 * 2**20  # of Parquet rows decoded at a time
BATCH_ROWS = 1024
UTF8_BOM = b"\xef\xbb\xbf"

MALFORMED_JSON = "malformed JSON"
NOT_UTF8 = "not valid UTF-8"
NOT_AN_OBJECT = "not a JSON object"
BEYOND_PARSER = "JSON beyond the parser's limits"
TOO_LARGE = f"row larger than {MAX_ROW_BYTES // 2**20} MiB"
WRONG_FIELD_COUNT = "wrong number of fields"
# The file itself is at fault, not what somebody wrote into a row.
UNREADABLE = frozenset(
    (MALFORMED_JSON, NOT_UTF8, NOT_AN_OBJECT, BEYOND_PARSER, TOO_LARGE, WRONG_FIELD_COUNT)
)

LINE_EXTENSIONS = (".jsonl", ".ndjson")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
EXTENSIONS = (*LINE_EXTENSIONS, ".json", ".parquet", *DELIMITERS)
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")


@dataclass(frozen=True)
class Rejection:
    """A record that cannot be used. The reason groups; the detail is this record's own."""

    row_id: str
    reason: str
    detail: str = ""


Record = dict[str, Any] | Rejection
Records = Iterator[tuple[str, Record]]
Open = Callable[[], IO[bytes]]


def read_records(name: str, open_file: Open, split: str = "train") -> Records:
    """Stream (row_id, record) of one file. `name` decides the format and begins each id; `split`
    chooses among the lists of a JSON document that has several.

    `open_file` is called for each pass over the file (at most three). Raises DataError for a
    structural fault and for an unknown format, OSError for a file that cannot be read.
    """
    extension, compression = split_name(name)

    def open_plain() -> _Stream:
        return _Stream(open_file(), compression)

    def open_buffered() -> io.BufferedReader:
        return io.BufferedReader(open_plain(), READ_BYTES)

    if extension == ".parquet":
        return _read_parquet(name, open_plain)
    if extension in DELIMITERS:
        return _read_table(name, open_buffered, DELIMITERS[extension])
    if extension in LINE_EXTENSIONS:
        return _read_lines(name, open_buffered)
    return _read_json(name, open_buffered, split, known=extension == ".json")


def split_name(name: str) -> tuple[str, str]:
    """The extension that says the format and the one that says the compression, either ""."""
    stem, compression = name.lower(), ""
    for suffix in COMPRESSIONS:
        if stem.endswith(suffix):
            stem, compression = stem.removesuffix(suffix), suffix
            break
    base = stem.rsplit("/", 1)[-1]
    return "." + base.rsplit(".", 1)[-1] if "." in base else "", compression


def known_formats() -> str:
    """The extensions that can be read, for messages."""
    return f"{' '.join(EXTENSIONS)}, each also with {' '.join(COMPRESSIONS)}"


# Bytes ------------------------------------------------------------------------------------------


@contextmanager
def only_os_errors() -> Iterator[None]:
    """Whatever a remote store or a decompressor raises, as an OSError that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{type(error).__name__}: {error}") from error


class _Stream(io.RawIOBase):
    """The plain bytes of a file; a fault of any kind is an OSError."""

    def __init__(self, handle: IO[bytes], compression: str) -> None:
        self._handle = handle
        self._plain: Any = _decompressed(handle, compression)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._plain is self._handle and bool(self._handle.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._handle.seek(offset, whence)

    def tell(self) -> int:
        return self._handle.tell()

    def readinto(self, buffer: Any) -> int:
        with only_os_errors():
            data = self._plain.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._handle.close()


def _decompressed(handle: IO[bytes], compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=handle)
    if compression == ".bz2":
        return bz2.BZ2File(handle)
    if compression == ".xz":
        return lzma.LZMAFile(handle)
    return _Zstandard(handle) if compression == ".zst" else handle


class _Zstandard:
    """All frames of a zstd file. The library's own reader takes a file that was cut for its end."""

    # One byte may stand for thousands: little goes in at a time, so that little comes out.
    PIECE = 16 * 2**10

    def __init__(self, handle: IO[bytes]) -> None:
        self._handle = handle
        self._frame: Any = None
        self._ahead = b""  # compressed, of the next frame
        self._plain = memoryview(b"")

    def read(self, size: int) -> memoryview:
        while not self._plain:
            piece = self._ahead or self._handle.read(self.PIECE)
            self._ahead = b""
            if not piece:
                if self._frame is not None:
                    raise EOFError("the zstd file ends in the middle of a frame")
                break
            frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
            self._plain = memoryview(frame.decompress(piece))
            self._ahead = frame.unused_data
            self._frame = None if frame.eof else frame
        taken, self._plain = self._plain[:size], self._plain[size:]
        return taken


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
    """Each line with its end; None for one beyond the limit, of which only the limit is held."""
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
        return Rejection(row_id, NOT_UTF8, _bad_byte(error, error.start))
    except json.JSONDecodeError as error:
        return Rejection(row_id, MALFORMED_JSON, f"{error.msg}: column {error.colno}")
    except (ValueError, RecursionError) as error:  # numbers or nesting
        return Rejection(row_id, BEYOND_PARSER, str(error))
    return _as_object(value, row_id)


def _bad_byte(error: UnicodeDecodeError, offset: int) -> str:
    return f"byte {offset + 1:,} is 0x{error.object[error.start]:02x} ({error.reason})"


def _as_object(value: Any, row_id: str) -> Record:
    if isinstance(value, dict):
        return value
    kind = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )
    detail = f'{kind}, expected an object such as {{"prompt": ..., "completion": ...}}'
    return Rejection(row_id, NOT_AN_OBJECT, detail)


# JSON -------------------------------------------------------------------------------------------


class _JsonFault(DataError):
    """A document that cannot be read on from this line."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(message)
        self.line = line


class _JsonText:
    """A JSON document seen through a window of text that moves along the file.

    Values are decoded by the standard library, so that one means here what it means on a line of
    JSON Lines. A value that does not decode may only be cut by the window's edge: the window grows
    until it does, or until the fault is known to lie before the edge.
    """

    # A fault this near to the edge may be the cut itself: "-Infinit", "\u00e", "1.".
    EDGE = 16
    SPACE = re.compile(r"[ \t\n\r]*")
    SCALAR_END = re.compile(r"[\s,\]}]")

    def __init__(self, name: str, stream: io.BufferedReader) -> None:
        self.name = name
        self.item = 0  # of an array: the one being read, or read last
        self._stream = stream
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._decode = json.JSONDecoder().raw_decode
        self._window, self._pos = "", 0
        self._line, self._column = 1, 1  # of the window's first character
        self._bytes = 0  # read so far
        self._ended = False
        self._broken: tuple[str, int] | None = None  # a bad byte just after the window; its line

    def peek(self) -> str:
        """The next character that is no space, which is then the next to read; "" at the end."""
        while True:
            self._pos = self.SPACE.match(self._window, self._pos).end()  # type: ignore[union-attr]
            if self._pos < len(self._window):
                return self._window[self._pos]
            if not self._more():
                return ""

    def take(self, expected: str) -> None:
        if self.peek() != expected:
            raise self.fault(f"expecting '{expected}'")
        self._pos += 1

    def value(self) -> Any:
        """The value that begins here, decoded; raises _JsonFault."""
        if self.peek() not in '{["':
            self._hold_scalar()
        while True:
            try:
                value, end = self._decode(self._window, self._pos)
            except json.JSONDecodeError as error:
                problem, ahead = error.msg, error.pos - self._pos
            except (ValueError, RecursionError) as error:  # numbers or nesting
                raise self.fault(f"it is beyond the parser's limits ({error})") from None
            else:
                self._check_size(end - self._pos)
                self._pos = end
                return value
            held = len(self._window) - self._pos
            cut = problem.startswith("Unterminated") or ahead >= held - self.EDGE
            if not cut or not self._more():
                raise self.fault(problem[:1].lower() + problem[1:], self._pos + ahead)
            self._check_size(held)

    def _hold_scalar(self) -> None:
        """Have a number in the window to its end: half of one decodes too."""
        while not self.SCALAR_END.search(self._window, self._pos) and self._more():
            self._check_size(len(self._window) - self._pos)

    def items(self) -> Iterator[Any]:
        """The items of the array that begins here."""
        self.take("[")
        self.item = 0
        if self.peek() == "]":
            self.take("]")
            return
        while True:
            self.item += 1
            yield self.value()
            if self.peek() == "]":
                self.take("]")
                return
            if self.peek() != ",":
                raise self.fault("expecting ',' delimiter")
            self.take(",")

    def fields(self) -> Iterator[str]:
        """The keys of the object that begins here; at each the caller reads the value."""
        self.take("{")
        if self.peek() == "}":
            self.take("}")
            return
        while True:
            if self.peek() != '"':
                raise self.fault("expecting property name enclosed in double quotes")
            key = self.value()
            self.take(":")
            yield key
            if self.peek() == "}":
                self.take("}")
                return
            if self.peek() != ",":
                raise self.fault("expecting ',' delimiter")
            self.take(",")

    def line(self) -> int:
        return self._place(self._pos)[0]

    def fault(self, problem: str, at: int | None = None) -> _JsonFault:
        line, column = self._place(self._pos if at is None else at)
        item = f", item {self.item}" if self.item else ""
        return _JsonFault(
            f"{self.name}: malformed JSON: {problem}: line {line}, column {column}{item}. "
            f"Expected one array of objects (.json) or one object per line (.jsonl); "
            f"correct the file there",
            line,
        )

    def _check_size(self, size: int) -> None:
        if size <= MAX_ROW_BYTES:
            return
        line, column = self._place(self._pos)
        item = f"item {self.item}" if self.item else "the value"
        raise _JsonFault(
            f"{self.name}: {item} at line {line}, column {column} is larger than "
            f"{MAX_ROW_BYTES:,} bytes, the largest row. Split it, or take it out",
            line,
        )

    def _place(self, pos: int) -> tuple[int, int]:
        """Line and column of a position in the window, both from 1."""
        lines = self._window.count("\n", 0, pos)
        if not lines:
            return self._line, self._column + pos
        return self._line + lines, pos - self._window.rindex("\n", 0, pos)

    def _more(self) -> bool:
        """Move the window to here and make it longer; False at the end of the file."""
        if self._broken:
            raise _JsonFault(*self._broken)
        if self._ended:
            return False
        self._line, self._column = self._place(self._pos)
        # As much again as is held: a large value is decoded a few times, not once a piece.
        raw = self._stream.read(max(READ_BYTES, len(self._window) - self._pos))
        self._ended = not raw
        piece = raw if self._bytes else raw.removeprefix(UTF8_BOM)
        kept = self._utf8.getstate()[0]
        try:
            text = self._utf8.decode(piece, final=self._ended)
        except UnicodeDecodeError as error:
            # What stands before the bad byte is good, and may be all that is asked for.
            text = error.object[: error.start].decode("utf-8")
            line = self._place(len(self._window))[0] + text.count("\n")
            where = self._bytes + len(raw) - len(piece) - len(kept) + error.start
            message = (
                f"{self.name}: not valid UTF-8: {_bad_byte(error, where)}, line {line}. "
                f"Save the file as UTF-8"
            )
            self._broken = message, line
        self._bytes += len(raw)
        self._window, self._pos = self._window[self._pos :] + text, 0
        return not self._ended or bool(self._broken)


ONE_ROW, LINES = 1, 2  # what a JSON file that begins with { may hold beside a list under a key


def _read_json(
    name: str, open_file: Callable[[], io.BufferedReader], split: str, known: bool
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
    if shape == LINES:
        yield from _read_lines(name, open_file)
        return
    with open_file() as stream:
        text = _JsonText(name, stream)
        items = iter([text.value()]) if shape == ONE_ROW else _items_under(text, shape)
        for number, item in enumerate(items, start=1):
            row_id = f"{name}#{number}"
            yield row_id, _as_object(item, row_id)


def _first_byte(stream: io.BufferedReader) -> bytes:
    """The first byte that is no space; b"" in a file of nothing else."""
    head = stream.read(READ_BYTES).removeprefix(UTF8_BOM).lstrip()
    while not head and (more := stream.read(READ_BYTES)):
        head = more.lstrip()
    return head[:1]


def _items_under(text: _JsonText, key: int | str | None) -> Iterator[Any]:
    """The items of the document's one array: the document itself, or the value of `key`."""
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
    name: str, open_file: Callable[[], io.BufferedReader], split: str
) -> int | str:
    """What a file that begins with { is: LINES, ONE_ROW or the key of its list of rows.

    The first object is read to its end, holding no more than one item at a time. If it is the
    first of lines, that is one line.
    """
    with open_file() as stream:
        text = _JsonText(name, stream)
        text.peek()
        first_line = text.line()
        try:
            lists, is_conversation = _lists_of_objects(text)
        except _JsonFault as fault:
            # Whether the document is broken or only a first line of many.
            if fault.line == first_line or _second_line_is_object(open_file):
                return LINES
            raise
        one_line = text.line() == first_line
        try:
            alone = not text.peek()
        except _JsonFault:
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
    if len(lists) == 1 or split in lists:
        return split if split in lists else lists[0]
    raise DataError(
        f"{name}: the rows are under several keys: {', '.join(lists)}, and split={split} is none "
        "of them. Set dataset.split (or eval.split) to one"
    )


def _lists_of_objects(text: _JsonText) -> tuple[list[str], bool]:
    """The keys whose value is a list of objects, and whether one is the turns of a conversation.

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
    # The library's own limit of 128 KiB is the process's, and a field may well be longer.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_ROW_BYTES))
    with open_file() as stream:
        # strict: else a quote that is never closed swallows the rest of the file as one value.
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
                f"{name}:{number}: not valid UTF-8: {_bad_byte(error, error.start)} of the line. "
                f"Save the file as UTF-8"
            ) from None


# Parquet ----------------------------------------------------------------------------------------


def _read_parquet(name: str, open_plain: Callable[[], _Stream]) -> Records:
    # late: a quarter of a second, and only these files need it.
    import pyarrow
    import pyarrow.parquet

    number = 0
    with open_plain() as plain, _seekable(plain) as stream:
        try:
            # pre_buffer would read the whole file before the first row; buffer_size has a large
            # row group read in pieces.
            file = pyarrow.parquet.ParquetFile(stream, pre_buffer=False, buffer_size=2**20)
            for batch in file.iter_batches(batch_size=_batch_size(file.metadata)):
                for row in _batch_rows(batch):
                    number += 1
                    yield f"{name}#{number}", _as_parquet_record(row, f"{name}#{number}")
        except (pyarrow.ArrowException, ValueError) as error:
            raise DataError(
                f"{name}: cannot be read as Parquet after {number:,} rows: "
                f"{type(error).__name__}: {error}. Write or download the file again"
            ) from error


def _batch_size(metadata: Any) -> int:
    """Rows that are about BATCH_BYTES together."""
    groups = range(metadata.num_row_groups)
    total = sum(metadata.row_group(i).total_byte_size for i in groups)
    return max(1, min(BATCH_ROWS, metadata.num_rows * BATCH_BYTES // max(total, 1)))


@contextmanager
def _seekable(stream: _Stream) -> Iterator[IO[bytes]]:
    """Parquet is read from its end: a compressed file is first unpacked, to disk."""
    if stream.seekable():
        yield stream  # type: ignore[misc]
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(stream, unpacked, READ_BYTES)
        unpacked.seek(0)
        yield unpacked


def _batch_rows(batch: Any) -> Iterator[dict[str, Any] | UnicodeDecodeError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # some writers do not look; then row by row
        for i in range(batch.num_rows):
            try:
                yield batch.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield error


def _as_parquet_record(row: dict[str, Any] | UnicodeDecodeError, row_id: str) -> Record:
    if isinstance(row, UnicodeDecodeError):
        return Rejection(row_id, NOT_UTF8, _bad_byte(row, row.start))
    return row
