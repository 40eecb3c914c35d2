"""Each format and compression gives the same records, in a stream, and each fault has its name."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from torchprime.data.files import json_text, readers, streams
from torchprime.data.files import record as records
from torchprime.data.files.arrow import read as arrow_files
from torchprime.data.files.readers import read_records
from torchprime.data.files.record import Rejection
from torchprime.data.files.splits import SplitKey
from torchprime.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": f"héllo {i} \u2028,\t{{[", "completion": f'a "quote"\nline {i}'} for i in range(300)
]


def limit(monkeypatch: pytest.MonkeyPatch, name: str, value: int) -> None:
    """MAX_ROW_BYTES or READ_BYTES, wherever it is looked at."""
    for module in (readers, json_text):
        monkeypatch.setattr(module, name, value)


def zstd_two_frames(data: bytes) -> bytes:
    squeeze, half = zstandard.ZstdCompressor().compress, len(data) // 2
    return squeeze(data[:half]) + squeeze(data[half:])


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd_two_frames,
}


def as_table(delimiter: str) -> bytes:
    out = io.StringIO()
    writer = csv.DictWriter(out, ["prompt", "completion"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(ROWS)
    return out.getvalue().encode()


def as_parquet(rows: list[dict[str, Any]], **options: Any) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out, **options)
    return out.getvalue()


# The file, and the id of row i (from 0). A CSV record here has two lines, after one of header.
FORMATS: dict[str, tuple[bytes, Callable[[int], str]]] = {
    ".jsonl": ("\n".join(map(json.dumps, ROWS)).encode(), lambda i: f":{i + 1}"),
    ".ndjson": ("\r\n".join(map(json.dumps, ROWS)).encode(), lambda i: f":{i + 1}"),
    ".json": (json.dumps(ROWS, indent=1, ensure_ascii=False).encode(), lambda i: f"#{i + 1}"),
    ".csv": (as_table(","), lambda i: f":{2 + 2 * i}"),
    ".tsv": (as_table("\t"), lambda i: f":{2 + 2 * i}"),
    ".parquet": (as_parquet(ROWS, row_group_size=70), lambda i: f"#{i + 1}"),
}


def read(name: str, content: bytes) -> list[tuple[str, Any]]:
    return list(read_records(name, lambda: io.BytesIO(content)))


def rows_of(name: str, content: bytes) -> list[Any]:
    return [record for _, record in read(name, content)]


def error_of(name: str, content: bytes) -> str:
    with pytest.raises(DataError) as caught:
        read(name, content)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("extension", FORMATS)
def test_every_format_and_compression(extension: str, compression: str) -> None:
    content, id_of = FORMATS[extension]
    name = f"Sub/rows{extension}{compression}"
    found = read(name, COMPRESS[compression](content))
    assert [record for _, record in found] == ROWS
    assert [row_id for row_id, _ in found] == [name + id_of(i) for i in range(len(ROWS))]


@pytest.mark.parametrize("compression", [key for key in COMPRESS if key])
@pytest.mark.parametrize("cut", [1, 9, 200])
def test_a_compressed_file_that_was_cut_is_an_error(compression: str, cut: int) -> None:
    content = COMPRESS[compression](FORMATS[".jsonl"][0])
    with pytest.raises(OSError, match="(?i)end"):
        read(f"rows.jsonl{compression}", content[:-cut])


def test_what_is_not_compressed_as_named() -> None:
    for compression in [key for key in COMPRESS if key]:
        with pytest.raises(OSError):
            read(f"rows.jsonl{compression}", b'{"a": 1}\n' * 99)


def test_the_name_decides_whatever_its_case() -> None:
    assert rows_of("A.JSONL.GZ", gzip.compress(b'{"a": 1}')) == [{"a": 1}]
    assert readers.split_name("x.y/name") == ("", "")
    assert readers.split_name("x.y/name.zst") == ("", ".zst")


# JSON Lines -------------------------------------------------------------------------------------


def test_lines_with_their_numbers_blank_ones_counted() -> None:
    content = b'\xef\xbb\xbf{"a": 1}\r\n\n  \n{"a": "\xc3\xa9\xe2\x80\xa8"}'
    assert read("t.jsonl", content) == [("t.jsonl:1", {"a": 1}), ("t.jsonl:4", {"a": "é\u2028"})]


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        (b'{"a": 1,}', records.MALFORMED_JSON, "column"),
        (b'{"a": ', records.MALFORMED_JSON, "Expecting value: column 7"),
        (b'{"a": "cut in ha', records.MALFORMED_JSON, "Unterminated string starting at: column 7"),
        (b'{"a": 1} {"a": 2}', records.MALFORMED_JSON, "Extra data: column 10"),
        (b"\x00\x00", records.MALFORMED_JSON, "Expecting value"),
        (b'{"a": "\xe9"}', records.NOT_UTF8, "byte 8 is 0xe9"),
        (b"\xff\xfe{", records.NOT_UTF8, "byte 1 is 0xff"),
        (b"[1]", records.NOT_AN_OBJECT, "an array, expected an object"),
        (b'"text"', records.NOT_AN_OBJECT, "a string"),
        (b"null", records.NOT_AN_OBJECT, "null"),
        (b"true", records.NOT_AN_OBJECT, "a boolean"),
        (b"4.5", records.NOT_AN_OBJECT, "a number"),
        (b"NaN", records.NOT_AN_OBJECT, "a number"),
        (b"[" * 200_000, records.BEYOND_PARSER, "recursion"),
    ],
)
@pytest.mark.parametrize(
    ("name", "before"), [("t.jsonl", b""), ("t.jsonl", b'{"a": 1}\n'), ("t.json", b'{"a": 1}\n')]
)
def test_a_broken_line_is_one_rejection(
    name: str, before: bytes, line: bytes, reason: str, detail: str
) -> None:
    good, number = {"a": 1}, 2 if before else 1
    found = read(name, before + line + b'\n{"a": 1}\n')
    rejection = found[number - 1][1]
    assert isinstance(rejection, Rejection)
    assert (rejection.row_id, rejection.reason) == (f"{name}:{number}", reason)
    assert detail in rejection.detail
    assert "\n" not in rejection.detail
    assert found[-1] == (f"{name}:{number + 1}", good)
    assert all(row_id == getattr(record, "row_id", row_id) for row_id, record in found)


def test_a_number_of_too_many_digits() -> None:
    (record,) = rows_of("t.jsonl", b'{"a": ' + b"9" * 5000 + b"}")
    assert isinstance(record, Rejection) and record.reason == records.BEYOND_PARSER


def test_constants_outside_of_json_are_floats() -> None:
    (record,) = rows_of("t.jsonl", b'{"a": [NaN, Infinity, -Infinity]}')
    assert str(record["a"]) == "[nan, inf, -inf]"
    (record,) = rows_of("t.json", b'[{"a": [NaN, Infinity, -Infinity]}]')
    assert str(record["a"]) == "[nan, inf, -inf]"


def test_a_line_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, "MAX_ROW_BYTES", 20)
    just = b'{"a": "' + b"x" * 11 + b'"}'
    assert len(just) == 20
    for end in (b"\n", b""):
        too_long = just[:9] + b"x" + just[9:]
        found = read("t.jsonl", too_long + b"\n" + just + b"\n" + too_long * 9000 + end + just)
        assert [row_id for row_id, _ in found] == [f"t.jsonl:{i + 1}" for i in range(len(found))]
        assert found[0][1] == Rejection("t.jsonl:1", records.TOO_LARGE)
        assert found[1][1] == {"a": "x" * 11}
        assert found[2][1] == Rejection("t.jsonl:3", records.TOO_LARGE)
        assert len(found) == (4 if end else 3)
    assert records.TOO_LARGE == "row larger than 64 MiB"


# Arrays -----------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None)
@given(
    items=st.lists(JSON_VALUES, max_size=6),
    piece=st.integers(1, 9),
    ascii_only=st.booleans(),
    indent=st.none() | st.integers(0, 3),
)
def test_array_wherever_the_pieces_end(
    items: list[Any], piece: int, ascii_only: bool, indent: int | None
) -> None:
    content = json.dumps(items, ensure_ascii=ascii_only, indent=indent)
    expected = [value if isinstance(value, dict) else None for value in json.loads(content)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", piece)
        found = rows_of("t.json", content.encode("utf-8", "surrogatepass"))
    assert [r if isinstance(r, dict) else None for r in found] == expected


def places_of(error: json.JSONDecodeError) -> list[tuple[int, int]]:
    """Return (line, column) of a fault; of a trailing comma, Python 3.13 names the comma, and 3.12
    what follows it."""
    found = [error]
    if error.msg.startswith("Illegal trailing comma"):
        rest = error.doc[error.pos + 1 :]
        after = len(error.doc) - len(rest.lstrip(" \n"))
        found.append(json.JSONDecodeError(error.msg, error.doc, after))
    return [(each.lineno, each.colno) for each in found]


@settings(max_examples=300, deadline=None)
@given(items=st.lists(JSON_VALUES, max_size=3), piece=st.integers(1, 9), data=st.data())
def test_array_that_is_damaged_anywhere(items: list[Any], piece: int, data: st.DataObject) -> None:
    """A cut, or one character changed: the same verdict as the whole file decoded at once."""
    content = json.dumps(items, indent=1)
    at = data.draw(st.integers(1, max(1, len(content) - 1)))
    change = data.draw(st.sampled_from([None, "", ",", '"', "}", "]", "1", "\\", " ", "\n"]))
    damaged = content[:at] if change is None else content[:at] + change + content[at + 1 :]
    try:
        expected = json.loads(damaged)
    except json.JSONDecodeError as error:
        expected = error
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "READ_BYTES", piece)
        if isinstance(expected, json.JSONDecodeError):
            message = error_of("t.json", damaged.encode())
            assert f": line {expected.lineno}, column {expected.colno}" in message
        else:
            assert len(rows_of("t.json", damaged.encode())) == len(expected)


def test_array_items_that_are_no_objects() -> None:
    found = read("t.json", b'\xef\xbb\xbf \n[{"a": 1}, 7, "x", [1.5], null, -12e3, {"b": {}}]\n ')
    assert [row_id for row_id, _ in found] == [f"t.json#{i}" for i in range(1, 8)]
    details = [r.detail.split(",")[0] for _, r in found if isinstance(r, Rejection)]
    assert details == ["a number", "a string", "an array", "null", "a number"]
    assert {r.reason for _, r in found if isinstance(r, Rejection)} == {records.NOT_AN_OBJECT}
    assert (found[0][1], found[6][1]) == ({"a": 1}, {"b": {}})


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'[\n {"a": 1}\n {"a": 2}\n]', "expecting ',' delimiter: line 3, column 2, item 1."),
        (b'[{"a": 1}, {"a": 2', "line 1, column 19, item 2."),
        (b'[{"a": 1},\n {"a": "cut', "unterminated string starting at: line 2, column 8, item 2"),
        (b'[{"a": 1}]\n[{"a": 2}]', "extra data after the end: line 2, column 1, item 1."),
        (b"[" * 200_000, "beyond the parser's limits"),
        (b'[{"a": "\xc3\xa9"},\n {"a": "\xe9"}]', "not valid UTF-8: byte 23 is 0xe9"),
        (b'\xef\xbb\xbf[{"a": "\xe9"}]', "not valid UTF-8: byte 12 is 0xe9"),
        (b'[{"a": "\xc3', "not valid UTF-8: byte 9 is 0xc3"),
    ],
)
@pytest.mark.parametrize("piece", [4, 5, 2**16])
def test_a_broken_array_names_the_place(
    monkeypatch: pytest.MonkeyPatch, piece: int, content: bytes, expected: str
) -> None:
    limit(monkeypatch, "READ_BYTES", piece)
    message = error_of("t.json", content)
    assert message.startswith("t.json: ")
    assert expected in message


def test_lone_surrogates_and_large_numbers_stay_as_they_are() -> None:
    """JSON that yajl, and so ijson, replaces or refuses."""
    content = b'[{"a": "\\ud800", "b": 12345678901234567890123, "c": 1e400}]'
    assert rows_of("t.json", content) == json.loads(content)


def test_an_item_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, "MAX_ROW_BYTES", 100)
    message = error_of("t.json", json.dumps([{"a": "x"}, {"a": "x" * 200}]).encode())
    assert "item 2 at line 1, column 14 is larger than 100 bytes" in message


# One object -------------------------------------------------------------------------------------


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("piece", [3, 2**16])
def test_object_with_one_list(
    monkeypatch: pytest.MonkeyPatch, indent: int | None, piece: int
) -> None:
    limit(monkeypatch, "READ_BYTES", piece)
    document = {"version": 1.5, "tags": ["x"], "train": [{"a": 1}, {"a": 2}], "meta": {"b": []}}
    found = read("t.json", json.dumps(document, indent=indent).encode())
    assert found == [("t.json#1", {"a": 1}), ("t.json#2", {"a": 2})]


def test_object_with_several_lists() -> None:
    document = {"train": [{"a": 1}], "valid": [{"a": 2}], "x": []}
    content = json.dumps(document).encode()
    found = list(readers.read_records("t.json", lambda: io.BytesIO(content), SplitKey("valid")))
    assert found == [("t.json#1", {"a": 2})]
    assert read("t.json", content) == [("t.json#1", {"a": 1})], "the split train is the default"
    other = json.dumps({"dev": [{"a": 1}], "valid": [{"a": 2}]}).encode()
    message = error_of("t.json", other)
    assert "under several keys, dev, valid, and dataset.split=train is none of them" in message
    eval_split = SplitKey(None, "eval.split", "null")
    with pytest.raises(DataError, match="keys, train, valid, and eval.split is not set"):
        list(readers.read_records("t.json", lambda: io.BytesIO(content), eval_split))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "completion": "b"},
        {"messages": [{"role": "user", "content": "a"}], "tools": [{"type": "function"}]},
        {"conversations": [{"from": "human", "value": "a"}]},
    ],
)
def test_object_that_is_the_one_row(row: dict[str, Any]) -> None:
    assert read("t.json", json.dumps(row).encode()) == [("t.json:1", row)]
    assert read("t.json", json.dumps(row, indent=1).encode()) == [("t.json#1", row)]
    two = "\n\n" + json.dumps(row) + "\n" + json.dumps(row)
    assert read("t.json", two.encode()) == [("t.json:3", row), ("t.json:4", row)]


def test_objects_over_several_lines_each() -> None:
    message = error_of("t.json", (json.dumps({"a": 1}, indent=1) * 2).encode())
    assert "extra data after the first object" in message
    assert "line 3, column 2" in message


def test_broken_object_with_a_list() -> None:
    message = error_of("t.json", b'{"train": [\n {"a": 1},\n {"a": 2,,}\n]}')
    assert "line 3" in message
    assert "item 2" in message


def test_lines_in_a_json_file_whose_first_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    for first in (b'{"a": ', b'{"a": [{"b": "x', b'{"a": "\xe9"}', b'{"a": 1,}'):
        found = rows_of("t.json", first + b'\n{"a": 2}\n{"a": 3}\n')
        assert isinstance(found[0], Rejection)
        assert found[1:] == [{"a": 2}, {"a": 3}]
    found = rows_of("t.json", b'{"a": 1}\n\xff\xfe\n{"a": 3}\n')
    assert [type(record) for record in found] == [dict, Rejection, dict]
    limit(monkeypatch, "MAX_ROW_BYTES", 30)
    found = rows_of("t.json", b'{"a": "' + b"x" * 40 + b'"}\n{"a": 2}\n')
    assert found == [Rejection("t.json:1", records.TOO_LARGE), {"a": 2}]


def test_unknown_names_go_by_content() -> None:
    assert rows_of("part-0001", b' \n[{"a": 1}]') == [{"a": 1}]
    assert rows_of("t.txt.gz", gzip.compress(b" " * 200_000 + b'{"a": 1}\n{"a": 2}')) == [
        {"a": 1},
        {"a": 2},
    ]
    assert rows_of("t.txt", b"\n") == []
    message = error_of("t.txt", b"once upon a time")
    for extension in readers.EXTENSIONS + readers.COMPRESSIONS:
        assert extension in message


# Tables -----------------------------------------------------------------------------------------


def test_csv_records() -> None:
    content = b'\xef\xbb\xbfq,a,n\r\n1,"x\r\ny, ""z""",\r\n\r\nonly,two\r\n4,,""\r\n1,2,3,4\r\n'
    assert read("t.csv", content) == [
        ("t.csv:2", {"q": "1", "a": 'x\r\ny, "z"', "n": None}),
        ("t.csv:5", Rejection("t.csv:5", records.WRONG_FIELD_COUNT, "2, the header has 3")),
        ("t.csv:6", {"q": "4", "a": None, "n": None}),
        ("t.csv:7", Rejection("t.csv:7", records.WRONG_FIELD_COUNT, "4, the header has 3")),
    ]
    assert read("t.csv", b"\n\nq\n") == []
    assert read("t.tsv", b"q\ta\n1,5\t2\n") == [("t.tsv:2", {"q": "1,5", "a": "2"})]


def test_csv_field_beyond_the_library_limit() -> None:
    (record,) = rows_of("t.csv", b"q\n" + b"x" * 500_000)
    assert record == {"q": "x" * 500_000}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'q,a\n1,2\n3,"never closed\n5,6\n', "t.csv:3: the record that starts here"),
        (b'q,a\n1,"x"y\n', "t.csv:2: the record that starts here"),
        (b"q,a\n1,\xe9\n", "t.csv:2: not valid UTF-8: byte 3 is 0xe9"),
        (b"q,a,q\n1,2,3\n", "t.csv:1: the header names 'q' more than once"),
    ],
)
def test_broken_csv(content: bytes, expected: str) -> None:
    assert error_of("t.csv", content).startswith(expected)


def test_csv_line_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, "MAX_ROW_BYTES", 20)
    assert "t.csv:2: the line is longer than 20 bytes" in error_of("t.csv", b"q\n" + b"x" * 21)


# Parquet ----------------------------------------------------------------------------------------


def test_parquet_nested_values_and_nulls() -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}], "n": 1, "t": None},
        {"messages": [], "n": None, "t": "x"},
    ]
    assert rows_of("t.parquet", as_parquet(rows)) == rows


def test_parquet_with_bytes_that_are_no_utf8() -> None:
    raw = pa.array([b"good", b"b\xe9d", b"fine"], pa.binary())
    text = pa.StringArray.from_buffers(len(raw), raw.buffers()[1], raw.buffers()[2])
    out = io.BytesIO()
    pq.write_table(pa.table({"a": text}), out)
    found = rows_of("t.parquet", out.getvalue())
    assert (found[0], found[2]) == ({"a": "good"}, {"a": "fine"})
    assert isinstance(found[1], Rejection)
    assert (found[1].row_id, found[1].reason) == ("t.parquet#2", records.NOT_UTF8)


def test_broken_parquet() -> None:
    whole = as_parquet(ROWS)
    assert "t.parquet: cannot be read as Parquet after 0 rows" in error_of("t.parquet", whole[:-9])
    assert "t.parquet: cannot be read as Parquet" in error_of("t.parquet", b'{"a": 1}')
    assert "t.parquet: cannot be read as Parquet" in error_of("t.parquet", b"")


# Streaming --------------------------------------------------------------------------------------


class Endless(io.RawIOBase):
    """A file that never ends, and counts what was taken from it."""

    def __init__(self, start: bytes, again: bytes) -> None:
        self._ahead, self._again, self.taken = start, again, 0

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        assert size >= 0, "asked for all of an endless file"
        while len(self._ahead) < size:
            self._ahead += self._again * (1 + size // len(self._again))
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        self.taken += size
        return data


@pytest.mark.parametrize(
    ("name", "start", "again"),
    [
        ("t.jsonl", b"", b'{"a": "%s"}\n' % (b"x" * 990)),
        ("t.json", b"[{}", b',{"a": "%s"}\n' % (b"x" * 990)),
        ("t.csv", b"a\n", b'"%s"\n' % (b"x" * 996)),
    ],
)
def test_rows_of_an_endless_file(name: str, start: bytes, again: bytes) -> None:
    opened: list[Endless] = []

    def open_file() -> IO[bytes]:
        opened.append(Endless(start, again))
        return cast("IO[bytes]", opened[-1])

    rows = read_records(name, open_file)
    assert isinstance(next(rows)[1], dict)
    assert sum(handle.taken for handle in opened) <= 3 * streams.READ_BYTES
    tracemalloc.start()
    try:
        assert sum(1 for _ in islice(rows, 20_000)) == 20_000  # 20 MB
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * 2**20
    rows.close()  # type: ignore[attr-defined]
    assert all(handle.closed for handle in opened)


def test_a_line_that_never_ends_is_not_held(monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, "MAX_ROW_BYTES", 2**20)
    content = b'{"a": "' + b"x" * 50 * 2**20 + b'"}\n{"a": 1}\n'
    rows = read_records("t.jsonl", lambda: io.BytesIO(content))
    tracemalloc.start()
    try:
        found = [record for _, record in rows]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found == [Rejection("t.jsonl:1", records.TOO_LARGE), {"a": 1}]
    assert peak < 5 * 2**20


class Counted(io.BytesIO):
    taken = 0

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.taken += len(data)
        return data


def test_first_parquet_rows_before_the_rest_is_read() -> None:
    rows = [
        {"a": f"{i} " + "".join(chr(97 + (i * j) % 26) for j in range(500))} for i in range(9999)
    ]
    content = as_parquet(rows, row_group_size=500, compression="none", use_dictionary=False)
    handle = Counted(content)
    found = read_records("t.parquet", lambda: handle)
    assert next(found) == ("t.parquet#1", rows[0])
    assert handle.taken < len(content) / 4
    assert [record for _, record in found] == rows[1:]
    assert handle.taken >= len(content) * 0.9  # the count counts


def test_parquet_rows_that_are_large_come_few_at_a_time() -> None:
    content = as_parquet([{"a": str(i) * 2**20} for i in range(9)], use_dictionary=False)
    size = arrow_files._parquet_batch_rows(pq.ParquetFile(io.BytesIO(content)).metadata)
    assert 7 <= size <= 8
    small = pq.ParquetFile(io.BytesIO(FORMATS[".parquet"][0])).metadata
    assert arrow_files._parquet_batch_rows(small) == arrow_files.BATCH_ROWS


def test_real_files(shared_dir: Path) -> None:
    files = sorted([*shared_dir.glob("data/*.json"), *shared_dir.glob("data/**/*.jsonl")])
    assert files
    for path in files:

        def rows(path: Path = path) -> Iterator[tuple[str, Any]]:
            return read_records(path.name, lambda: path.open("rb"))

        records = [record for _, record in rows()]
        text = path.read_text()
        if path.suffix == ".jsonl":
            expected = [json.loads(line) for line in text.splitlines() if line.strip()]
        else:
            whole = json.loads(text)
            if path.name == "pirate_conversations.json":  # two lists, train and valid
                whole = whole["train"]
            expected = [whole] if isinstance(whole, dict) else whole
        assert records == expected, path
