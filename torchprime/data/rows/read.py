"""The rows of a source, streamed: all records are read as one kind.

`auto` decides the kind once, from the first rows, and never guesses between kinds; `columns` maps
our fields to the source's columns (formats.py). reader.py reads one record. A record that can't be
used is a `Rejection`, to be counted, not an exception.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from torchprime.data.files.open_source import read_rows
from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows import keys as row_keys
from torchprime.data.rows.answer_form import AS_IS, KINDS_WITH_ANSWERS
from torchprime.data.rows.formats import (
    QUESTION_PROMPT,
    FormatDecision,
    check_columns,
    decide_format,
)
from torchprime.data.rows.reader import RowReader, read_row
from torchprime.data.rows.row import PLAIN_READING, Row, RowReading
from torchprime.data.rows.trees import read_trees
from torchprime.data.shared.fields import (
    BAD_ID,
    DUPLICATED_ID,
    NO_ID,
    Unusable,
    scalar_of,
    show,
)
from torchprime.data.shared.notes import RowNotes, example_of
from torchprime.errors import DataError

__all__ = ["QUESTION_PROMPT", "SAMPLE_ROWS", "Row", "RowReading", "open_rows", "read_row"]

SAMPLE_ROWS = 100
WITHOUT_INPUT = ("text", "tree")  # kinds that use every column that could be a question


# All records -------------------------------------------------------------------------------------


def open_rows(
    source: SourceSpec,
    reading: RowReading,
    notes: RowNotes | None = None,
) -> tuple[FormatDecision, Iterator[Row | Rejection]]:
    """Decide the kind from the first records, then stream all records, including the first ones.

    Records that could not be read are passed on as rejections.

    Args:
        notes: counts findings in the rows while they are read.

    Raises:
        DataError: no kind can be decided, `reading` names a missing field, or there are no rows.
    """
    check_columns(reading.columns)
    notes = RowNotes() if notes is None else notes
    records = read_rows(source, notes)
    sample = list(islice(records, SAMPLE_ROWS))
    first = [record for _, record in sample]
    decision = decide_format(first, reading, source)
    if reading.answer_form != AS_IS and decision.kind not in KINDS_WITH_ANSWERS:
        raise DataError(
            f"dataset.answer_form={reading.answer_form} is for rows with one answer each "
            f"({', '.join(KINDS_WITH_ANSWERS)}), but these are {decision.kind} ({decision.why}). "
            "Set dataset.answer_form=as_is"
        )
    reader = RowReader(decision.kind, reading, source.name, notes)
    decision = _with_unused(decision, first, reading)
    read_all = _read_trees if decision.kind == "tree" else _read_all
    return decision, read_all(chain(sample, records), reader)


def _with_unused(
    decision: FormatDecision, sample: Sequence[Mapping[str, Any] | Rejection], reading: RowReading
) -> FormatDecision:
    """Add the unread columns of the sampled records to the decision."""
    reader = RowReader(decision.kind, reading)
    records = [record for record in sample if not isinstance(record, Rejection)]
    if decision.kind == "tree":
        pairs = [(record, None) for record in records]
    else:
        read = [(record, reader.read("", record)) for record in records]
        pairs = [(record, row) for record, row in read if isinstance(row, Row)]
    columns = row_keys.unused_columns(pairs, reader.keys)
    like_input = [path for path, each in columns.items() if each.looks_like_input(len(pairs))]
    return replace(
        decision,
        unused={path: example_of(each.values[0]) for path, each in columns.items()},
        like_input=() if decision.kind in WITHOUT_INPUT else tuple(like_input),
    )


Records = Iterable[tuple[str, Mapping[str, Any] | Rejection]]


def _read_all(records: Records, reader: RowReader) -> Iterator[Row | Rejection]:
    seen: dict[bytes, str] = {}
    id_key = reader.reading.id_key
    for row_id, record in records:
        if isinstance(record, Rejection):
            yield record
            continue
        row = reader.read(row_id, record)
        if id_key is not None and isinstance(row, Row):
            row = _claim_id(row, record, id_key, seen)
        yield row


def _read_trees(records: Records, reader: RowReader) -> Iterator[Row | Rejection]:
    """Read trees: several rows from one record, or one row from several records."""
    seen: dict[bytes, str] = {}
    id_key = reader.reading.id_key
    for tree in read_trees(records, reader.reading.columns):
        if isinstance(tree, Rejection):
            yield tree
            continue
        rows = list(reader.read_tree(tree))
        if id_key is not None and isinstance(rows[0], Row):
            claimed = _claim_id(rows[0], tree.record, id_key, seen)
            rows = rows if isinstance(claimed, Row) else [claimed]
        yield from rows


def _claim_id(
    row: Row, record: Mapping[str, Any], key: str, seen: dict[bytes, str]
) -> Row | Rejection:
    """Return the row if its id is new. Rejected rows claim none: a repaired copy may follow."""
    try:
        value = scalar_of(record, key, NO_ID, BAD_ID)
    except Unusable as unusable:
        return Rejection(row.row_id, unusable.reason, unusable.detail)
    digest = hashlib.blake2b(value.encode("utf-8"), digest_size=16).digest()
    first = seen.setdefault(digest, row.row_id)
    if first == row.row_id:
        return row
    return Rejection(row.row_id, DUPLICATED_ID, f"{show(value)} is the id of {first} already")


def load_rows(source: SourceSpec, limit: int, *, reading: RowReading = PLAIN_READING) -> list[Row]:
    """Return the first `limit` usable rows, to show answers to a person."""
    _, rows = open_rows(source, reading)
    return list(islice((row for row in rows if isinstance(row, Row)), limit))
