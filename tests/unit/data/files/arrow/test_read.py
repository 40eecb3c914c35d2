"""Arrow files of both formats: rows in a stream, and no end that is not the file's."""

from __future__ import annotations

import gzip
import io
import struct
from typing import Any

import pyarrow as pa
import pytest

from torchprime.data.files.arrow import read as arrow_files
from torchprime.data.files.readers import read_records
from torchprime.data.files.record import Rejection
from torchprime.errors import DataError

ROWS = [{"a": f"{i}" * 50, "n": {"x": i, "y": "é"}} for i in range(300)]
TABLE = pa.Table.from_pylist(ROWS)


def as_stream(table: pa.Table = TABLE, rows: int = 70, **options: Any) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_stream(out, table.schema, **options) as writer:
        writer.write_table(table, max_chunksize=rows)
    return out.getvalue()


def as_file(table: pa.Table = TABLE, rows: int = 70) -> bytes:
    out = io.BytesIO()
    with pa.ipc.new_file(out, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)
    return out.getvalue()


def read(content: bytes, name: str = "t.arrow") -> list[tuple[str, Any]]:
    return list(read_records(name, lambda: io.BytesIO(content)))


def error_of(content: bytes) -> str:
    with pytest.raises(DataError) as caught:
        read(content)
    return str(caught.value)


EXPECTED = [(f"t.arrow#{n}", row) for n, row in enumerate(ROWS, 1)]
LZ4 = pa.ipc.IpcWriteOptions(compression="lz4")


@pytest.mark.parametrize(
    "content", [as_stream(), as_file(), as_stream(rows=10**6), as_stream(options=LZ4)]
)
def test_both_formats(content: bytes) -> None:
    assert read(content) == EXPECTED


def test_a_large_batch_is_converted_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrow_files, "BATCH_BYTES", 500)
    stream = pa.ipc.open_stream(as_stream(rows=10**6))
    sizes = [piece.num_rows for piece in arrow_files._pieces(stream)]
    assert sum(sizes) == 300
    assert 2 <= max(sizes) <= 10
    for content in (as_stream(rows=10**6), as_file(rows=10**6)):
        assert read(content) == EXPECTED


def test_no_rows() -> None:
    assert read(as_stream(TABLE.slice(0, 0))) == read(as_file(TABLE.slice(0, 0))) == []


def test_a_stream_that_was_cut_or_goes_on() -> None:
    whole = as_stream()
    one = len(as_stream(TABLE.slice(0, 70))) - len(arrow_files.END_OF_STREAM)
    # Between two batches, where pyarrow sees nothing amiss; just before the end; in a batch.
    for cut, rows in ((one, 70), (len(whole) - 8, 300), (len(whole) - 4, 300), (one + 99, 70)):
        message = error_of(whole[:cut])
        assert f"t.arrow: cannot be read as an Arrow stream after {rows} rows" in message
    assert "has no end marker" in error_of(whole[:one])
    assert "there are bytes after its end" in error_of(whole + whole)


def test_sizes_beyond_the_file_take_no_memory() -> None:
    """A damaged stream asks for as many bytes as it says that follow."""
    whole = as_stream(TABLE.slice(0, 2))
    of_schema = len(as_stream(TABLE.slice(0, 0))) - len(arrow_files.END_OF_STREAM)
    size = len(pa.ipc.read_message(whole[of_schema:]).body).to_bytes(8, "little")
    assert whole.count(size) == 1
    damaged = whole.replace(size, (1 << 40).to_bytes(8, "little"))
    for name, content in (("t.arrow", damaged), ("t.arrow.gz", gzip.compress(damaged))):
        with pytest.raises(OSError, match="able to read 1099511627776 bytes"):
            read(content, name)


def text_array(texts: list[bytes], *ends: int) -> pa.Array:
    offsets = pa.py_buffer(struct.pack(f"<{len(ends) + 1}i", 0, *ends))
    return pa.StringArray.from_buffers(len(ends), offsets, pa.py_buffer(b"".join(texts)))


@pytest.mark.parametrize("write", [as_stream, as_file])
def test_offsets_out_of_the_batch_are_refused(write: Any) -> None:
    """Each is read as the place of a value."""
    texts = text_array([b"a", b"b"], 1, 2)
    bad = text_array([b"a", b"b"], 2**30, 2)
    in_lists = pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), bad)
    keys = pa.py_buffer(struct.pack("<2i", 0, 9))
    outside = pa.DictionaryArray.from_buffers(
        pa.dictionary(pa.int32(), pa.string()), 2, [None, keys], texts
    )
    not_text = text_array([b"\xff", b"b"], 1, 2)
    for array in (bad, in_lists, outside):
        for columns in ({"a": array}, {"t": not_text, "a": array}):
            with pytest.raises(DataError, match="cannot be read as an Arrow"):
                read(write(pa.table(columns)))
    nested = pa.StructArray.from_arrays(
        [pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), not_text)], ["l"]
    )
    rejected, kept = [row for _, row in read(write(pa.table({"t": not_text, "n": nested})))]
    assert isinstance(rejected, Rejection) and kept == {"t": "b", "n": {"l": ["b"]}}


@pytest.mark.parametrize("old", [b"column", b"inner"])
def test_names_that_are_no_text(old: bytes) -> None:
    content = as_stream(pa.table({"column": [{"inner": 1}]})).replace(old, b"\xff" + old[1:])
    assert "the name of a column or field is not UTF-8" in error_of(content)


def test_what_is_no_arrow_file() -> None:
    assert "cannot be read as an Arrow file after 0 rows" in error_of(as_file()[:-9])
    for content in (b"", b"ARR", b'{"a": 1}\n' * 9):
        assert "cannot be read as an Arrow stream after 0 rows" in error_of(content)
