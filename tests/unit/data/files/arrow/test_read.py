"""Arrow files of both formats: rows in a stream, and no end that is not the file's."""

from __future__ import annotations

import io
from typing import Any

import pyarrow as pa
import pytest

from torchprime.data.files.arrow import read as arrow_files
from torchprime.data.files.readers import read_records
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
    assert "ends without the mark of its end" in error_of(whole[:one])
    assert "something follows behind its end" in error_of(whole + whole)


def test_what_is_no_arrow_file() -> None:
    assert "cannot be read as an Arrow file after 0 rows" in error_of(as_file()[:-9])
    for content in (b"", b"ARR", b'{"a": 1}\n' * 9):
        assert "cannot be read as an Arrow stream after 0 rows" in error_of(content)
