"""Rows of Parquet and Arrow files, batch by batch; arrow/rows.py converts a batch to records."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any, cast

from torchprime.data.files.record import Records, Rejection
from torchprime.data.files.streams import READ_BYTES, PlainStream
from torchprime.data.shared.notes import RowNotes
from torchprime.errors import DataError

BATCH_BYTES = 8 * 2**20  # size of the rows converted at a time
BATCH_ROWS = 1024
MOST_ENTRIES = 100_000  # columns or row groups; a damaged Parquet file may tell of millions

ARROW_FILE = b"ARROW1"  # the first bytes of the file format; the stream format begins with a size
END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"


def arrow_records(
    name: str, ids: str, schema: Any, batches: Iterable[Any], notes: RowNotes | None
) -> Records:
    """Stream the rows of record batches, or of one-chunk tables; row n has the id `ids` + n.

    `name` is the name of the file or dataset, for messages.
    """
    # late: pyarrow takes a quarter of a second, and only these files need it
    from torchprime.data.files.arrow.rows import BY_STORAGE, FILLED_IN, ArrowRows, BadValue

    try:
        converter, notes = ArrowRows(name, schema), notes or RowNotes()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: the name of a column or field is not UTF-8: {error}. Write the file again"
        ) from None
    stored = ", ".join(converter.by_storage)

    def numbered(batch: Any, number: int) -> Records:
        """Yield a batch's records; they are freed before the next batch is converted."""
        records, filled = converter.records(batch)
        for i, record in enumerate(records):
            row_id = f"{ids}{number + i}"
            if filled and filled[i]:
                notes.notice(FILLED_IN, row_id, filled[i])
            if stored:
                notes.notice(BY_STORAGE, row_id, 1, stored)
            if isinstance(record, BadValue):
                record = Rejection(row_id, record.reason, record.detail)
            yield row_id, record

    number = 1
    for batch in batches:
        yield from numbered(batch, number)
        number += batch.num_rows


def batch_rows(total_rows: int, total_bytes: int) -> int:
    """Return the number of rows that together have about BATCH_BYTES."""
    return max(1, min(BATCH_ROWS, total_rows * BATCH_BYTES // max(total_bytes, 1)))


# Parquet ----------------------------------------------------------------------------------------


def read_parquet(
    name: str, open_plain: Callable[[], PlainStream], notes: RowNotes | None = None
) -> Records:
    """Stream the rows of a Parquet file."""
    import pyarrow.parquet  # late: as above

    kind = "Parquet"
    with open_plain() as plain, _seekable(plain) as stream:
        with _faults(name, kind):
            # pre_buffer would read the whole file before the first row; buffer_size has a large
            # row group read in pieces.
            file = pyarrow.parquet.ParquetFile(
                stream,
                pre_buffer=False,
                buffer_size=2**20,
                thrift_container_size_limit=MOST_ENTRIES,
            )
            batches = file.iter_batches(batch_size=_parquet_batch_rows(file.metadata))
            schema = file.schema_arrow
        yield from arrow_records(name, f"{name}#", schema, _watched(batches, name, kind), notes)


def _parquet_batch_rows(metadata: Any) -> int:
    groups = (metadata.row_group(i) for i in range(metadata.num_row_groups))
    return batch_rows(metadata.num_rows, sum(group.total_byte_size for group in groups))


def _watched(batches: Iterable[Any], name: str, kind: str) -> Iterator[Any]:
    """Yield the batches; raise a DataError with the rows read so far if one cannot be read."""
    number, following = 0, iter(batches)
    while True:
        with _faults(name, kind, number):
            batch = next(following, None)
        if batch is None:
            return
        yield batch
        number += batch.num_rows


@contextmanager
def _faults(name: str, kind: str, number: int = 0) -> Iterator[None]:
    import pyarrow  # late: as above

    try:
        yield
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(
            f"{name}: cannot be read as {kind} after {number:,} rows: "
            f"{type(error).__name__}: {error}. Write or download the file again"
        ) from error


@contextmanager
def _seekable(stream: PlainStream) -> Iterator[PlainStream]:
    """Return a seekable file, as Parquet and Arrow need; a compressed one is unpacked to disk."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(stream, unpacked, READ_BYTES)
        unpacked.seek(0)
        yield PlainStream(cast("IO[bytes]", unpacked), "")


# Arrow ------------------------------------------------------------------------------------------


def read_arrow(
    name: str, open_plain: Callable[[], PlainStream], notes: RowNotes | None = None
) -> Records:
    """Stream the rows of an Arrow file, in the stream format or the file format."""
    import pyarrow.ipc  # late: as above

    with open_plain() as plain:
        is_file_format = _Tail(plain).read(len(ARROW_FILE)) == ARROW_FILE
    kind = "an Arrow file" if is_file_format else "an Arrow stream"
    with open_plain() as plain, ExitStack() as held:
        with _faults(name, kind):
            if is_file_format:
                file = pyarrow.ipc.open_file(held.enter_context(_seekable(plain)))
                batches, schema = map(file.get_batch, range(file.num_record_batches)), file.schema
            else:
                tail = _Tail(plain)
                stream = pyarrow.ipc.open_stream(tail)
                batches, schema = _to_the_end(stream, tail), stream.schema
        pieces = _watched(_pieces(batches), name, kind)
        yield from arrow_records(name, f"{name}#", schema, pieces, notes)


def _to_the_end(stream: Any, tail: _Tail) -> Iterator[Any]:
    """Yield all batches of a stream, which has to end at the end of the file."""
    yield from stream
    if tail.last != END_OF_STREAM:
        raise ValueError("it has no end marker: it was truncated, or not closed")
    if tail.read(1):
        raise ValueError("there are bytes after its end")


class _Tail:
    """A stream that remembers its last bytes: pyarrow takes a truncated stream for a whole one."""

    closed = False

    def __init__(self, stream: PlainStream) -> None:
        self._stream = stream
        self.last = b""

    def read(self, size: int) -> bytes:
        pieces = []
        while size and (piece := self._stream.read(size)):
            pieces.append(piece)
            size -= len(piece)
        data = b"".join(pieces)
        self.last = (self.last + data[-len(END_OF_STREAM) :])[-len(END_OF_STREAM) :]
        return data

    def close(self) -> None:
        """Do nothing: the function that opened the stream closes it."""


def _pieces(batches: Iterable[Any]) -> Iterator[Any]:
    """Split large batches into pieces, checked: a whole data set may be one batch."""
    from torchprime.data.files.arrow.checks import check_batch  # late: as above

    for batch in batches:
        check_batch(batch)
        size = batch_rows(batch.num_rows, batch.nbytes)
        yield from (batch.slice(start, size) for start in range(0, batch.num_rows, size))
