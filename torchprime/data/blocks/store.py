"""Tokenized examples on disk: one Arrow file, read through a memory map, never loaded whole.

Examples are stored end to end in the order they were made. Each has its ids, the loss weight and
the rule of every token, its row id and its source in the mixture. Reading one example touches only
its pages, so a data set larger than memory can be trained. If a preparation is not to be kept, the
same table is in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from torchprime.data.tokens.completions import Example

Ints = npt.NDArray[np.int64]

SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("source", pa.string()),
        ("supervised", pa.int32()),  # number of targets in this example when it is whole
        ("ids", pa.large_list(pa.int32())),
        ("weights", pa.large_list(pa.float32())),
        ("rules", pa.large_list(pa.uint8())),
    ]
)
PER_TOKEN = ("ids", "weights", "rules")


def to_record_batch(examples: Sequence[Example]) -> pa.RecordBatch:
    """Return examples as one Arrow batch of SCHEMA."""
    offsets = np.concatenate([[0], np.cumsum([len(e.ids) for e in examples])]).astype(np.int64)

    def tokens(name: str, dtype: type) -> pa.Array:
        flat = np.concatenate([getattr(e, name) for e in examples]).astype(dtype, copy=False)
        return pa.LargeListArray.from_arrays(_arrow(offsets), _arrow(flat))

    columns = [
        _strings([e.row_id for e in examples]),
        _strings([e.source for e in examples]),
        _arrow(np.array([(e.weights[1:] > 0).sum() for e in examples], dtype=np.int32)),
        tokens("ids", np.int32),
        tokens("weights", np.float32),
        tokens("rules", np.uint8),
    ]
    return pa.record_batch(columns, schema=SCHEMA)


def _arrow(values: npt.NDArray[Any]) -> pa.Array:
    """Wrap the memory as an Arrow array; `pa.array` first imports pandas, for 0.25 s."""
    values = np.ascontiguousarray(values)
    kind = pa.from_numpy_dtype(values.dtype)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(values)])


def _strings(values: Sequence[str]) -> pa.Array:
    """Return texts as an Arrow array, without importing pandas."""
    encoded = [value.encode("utf-8", "replace") for value in values]
    offsets = np.concatenate([[0], np.cumsum([len(each) for each in encoded])]).astype(np.int32)
    buffers = (pa.py_buffer(offsets), pa.py_buffer(b"".join(encoded)))
    return pa.StringArray.from_buffers(len(encoded), *buffers)


class Tokens(NamedTuple):
    """Views of one example's tokens."""

    ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    rules: npt.NDArray[np.uint8]


class ExampleStore:
    """Random access to examples of an Arrow table of SCHEMA."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table
        chunks = [table.column(name).chunks for name in PER_TOKEN]
        self._offsets = [chunk.offsets.to_numpy(zero_copy_only=True) for chunk in chunks[0]]
        self._values = [
            [chunk.values.to_numpy(zero_copy_only=True) for chunk in column] for column in chunks
        ]
        sizes = [len(offsets) - 1 for offsets in self._offsets]
        self._first = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        empty: list[Ints] = [np.zeros(0, dtype=np.int64)]
        self.lengths: Ints = np.concatenate([np.diff(o) for o in self._offsets] or empty)
        self.supervised: Ints = table.column("supervised").to_numpy().astype(np.int64)
        encoded = table.column("source").combine_chunks().dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.combine_chunks()
        self.source_names: list[str] = encoded.dictionary.to_pylist()
        self.sources: npt.NDArray[np.int32] = encoded.indices.to_numpy(zero_copy_only=False)

    @classmethod
    def from_examples(cls, examples: Sequence[Example]) -> ExampleStore:
        """Return a store that holds these examples in memory."""
        return cls(pa.Table.from_batches([to_record_batch(examples)], schema=SCHEMA))

    @classmethod
    def open(cls, path: Path) -> ExampleStore:
        """Open a store through a memory map."""
        with pa.memory_map(str(path)) as source:
            return cls(pa.ipc.open_file(source).read_all())

    def __len__(self) -> int:
        return len(self.lengths)

    def row_id(self, index: int) -> str:
        return self._table.column("row_id")[index].as_py()

    def tokens(self, index: int) -> Tokens:
        """Return one example's ids, weights and rules."""
        chunk = int(np.searchsorted(self._first, index, side="right")) - 1
        local = index - int(self._first[chunk])
        start, end = self._offsets[chunk][local : local + 2].tolist()
        return Tokens(*(values[chunk][start:end] for values in self._values))

    def fingerprint(self) -> str:
        """Return a sha256 of all ids, weights, lengths and sources, however they are batched."""
        digest = hashlib.sha256(np.ascontiguousarray(self.lengths.astype("<i8")).data)
        for name, dtype, column in zip(PER_TOKEN, ("<i4", "<f4", "u1"), self._values, strict=True):
            if name == "rules":  # rules explain the labels but are not part of a batch
                continue
            for offsets, values in zip(self._offsets, column, strict=True):
                used = values[offsets[0] : offsets[-1]]
                digest.update(np.ascontiguousarray(used.astype(dtype, copy=False)).data)
        digest.update("\0".join(self.source_names[i] for i in self.sources.tolist()).encode())
        return digest.hexdigest()


class StoreWriter:
    """A writer that appends examples to an Arrow file, or to memory if `path` is None."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._sink = pa.OSFile(str(path), "wb") if path is not None else None
        self._writer = pa.ipc.new_file(self._sink, SCHEMA) if self._sink is not None else None
        self._batches: list[pa.RecordBatch] = []

    def write(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        if self._writer is not None:
            self._writer.write_batch(batch)
        else:
            self._batches.append(batch)

    def close(self) -> None:
        if self._writer is not None and self._sink is not None:
            self._writer.close()
            self._sink.close()

    def open(self) -> ExampleStore:
        """Open the written store, after `close`."""
        if self._path is not None:
            return ExampleStore.open(self._path)
        return ExampleStore(pa.Table.from_batches(self._batches, schema=SCHEMA))


@contextmanager
def writing(path: Path | None) -> Iterator[StoreWriter]:
    """Yield a writer that is closed at the end, also after an error."""
    writer = StoreWriter(path)
    try:
        yield writer
    finally:
        writer.close()
