"""The kind of a source's records, decided once, and the mapping of their field names."""

from __future__ import annotations

import dataclasses
import difflib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torchprime.data.files.record import Rejection
from torchprime.data.files.source import SourceSpec
from torchprime.data.messages.json_fields import objects_of_text
from torchprime.data.rows.row import RowReading
from torchprime.data.shared.fields import MISSING, lookup, printable
from torchprime.errors import DataError

# The fields that a record of each kind needs.
FIELDS: dict[str, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "alpaca": ("instruction", "output"),
    "messages": ("messages",),
    "sharegpt": ("conversations",),
    "text": ("text",),
    "preference": ("chosen", "rejected"),
    "tree": ("message_tree_id",),
}
ASKED_FOR = ("preference",)  # never chosen by `auto`: the other half of such a row is not trained
# The marks of a tree's record: nested messages, or one message each.
FLAT_TREE = ("message_tree_id", "message_id", "text", "role")
# The prompt of a question-answer row, as a model receives it.
QUESTION_PROMPT = "Question:\n{question}\n\n\nAnswer:\n"
STRUCTURED = ("messages", "sharegpt")
CANONICAL_FIELDS = (
    *(field for fields in FIELDS.values() for field in fields),
    *("input", "system", "history", "tools", "functions", "weight"),
    *("message_id", "parent_id", "role", "rank", "deleted"),
    *("message.role", "message.content"),
)


@dataclass(frozen=True)
class FormatDecision:
    """The kind that all rows are read as, and the reason for it.

    Attributes:
        unused: an example of each column of the sampled rows that is not read.
        like_input: names of unused columns with long texts that differ in each row.
    """

    kind: str
    why: str
    unused: Mapping[str, str] = dataclasses.field(default_factory=dict)
    like_input: tuple[str, ...] = ()


def decide_format(
    sample: Sequence[Mapping[str, Any] | Rejection], reading: RowReading, source: SourceSpec
) -> FormatDecision:
    """Use the requested kind, or the one kind whose fields the sampled records have.

    A list of messages is preferred over strings beside it, since those are made from it. There is
    no other preference between kinds.

    Raises:
        DataError: an unknown canonical field; or `auto` finds no kind, or more than one.
    """
    requested, columns = reading.format, reading.columns
    check_columns(columns)
    if requested != "auto":
        return FormatDecision(requested, f"dataset.format={requested}")
    records = [rename(row, columns) for row in sample if not isinstance(row, Rejection)]
    if sample and not records:
        raise DataError(_unreadable([row for row in sample if isinstance(row, Rejection)], source))
    fits = [_fitting_kinds(row) for row in records]
    chosen = [_preferred(kinds, row) for kinds, row in zip(fits, records, strict=True)]
    counts = Counter(" + ".join(kinds) for kinds in chosen)
    unknown = counts.pop("", 0)
    kind = next(iter(counts), "")
    if len(counts) == 1 and kind in FIELDS:
        beside = Counter(k for kinds in fits if len(kinds) > 1 for k in kinds if k != kind)
        return FormatDecision(kind, _why(kind, counts[kind], len(sample), beside))
    if counts:
        found = ", ".join(f"{kinds}: {n} rows" for kinds, n in counts.most_common())
        raise DataError(
            f"dataset.format=auto cannot decide: the first {len(sample)} rows of the "
            f"{source.section} source are a mixture "
            f"({found}{f', none: {unknown} rows' if unknown else ''}). "
            f"Set dataset.format to one of {', '.join(FIELDS)}"
        )
    raise DataError(_no_kind(records, columns, len(sample), source))


def _why(kind: str, fitting: int, sampled: int, beside: Counter[str]) -> str:
    why = f"{fitting} of the first {sampled} rows have {' and '.join(FIELDS[kind])}"
    if beside:
        others = ", ".join(f"{' and '.join(FIELDS[k])} ({n} rows)" for k, n in beside.items())
        why += f", a list of messages, which is preferred over the strings beside it: {others}"
    return why


def _fitting_kinds(row: Mapping[str, Any]) -> list[str]:
    """Return the kinds whose fields this row has; null fields count only as a last resort."""
    if is_tree(row):
        return ["tree"]
    kinds = {k: fields for k, fields in FIELDS.items() if k not in (*ASKED_FOR, "tree")}
    full = [k for k, fields in kinds.items() if all(row.get(f) is not None for f in fields)]
    return full or [k for k, fields in kinds.items() if all(f in row for f in fields)]


def is_tree(row: Mapping[str, Any]) -> bool:
    """Return True for a tree of messages, or for one message of such a tree."""
    if all(name in row for name in FLAT_TREE):
        return True
    prompt = row.get("prompt")
    return "message_tree_id" in row and isinstance(prompt, Mapping) and "text" in prompt


def _preferred(kinds: list[str], row: Mapping[str, Any]) -> list[str]:
    """Prefer one list of messages over strings, its first or last turn, but not over `text`."""
    lists = [k for k in kinds if k in STRUCTURED and _is_list(row[FIELDS[k][0]])]
    if len(lists) != 1 or "text" in kinds:
        return kinds
    others = [row[field] for k in kinds if k not in lists for field in FIELDS[k]]
    return lists if all(isinstance(value, str) for value in others) else kinds


def _is_list(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, str) and bool(objects_of_text(value)))


def _unreadable(rejections: list[Rejection], source: SourceSpec) -> str:
    counts = ", ".join(f"{r}: {n}" for r, n in Counter(r.reason for r in rejections).most_common())
    first = rejections[0]
    return (
        f"dataset.format=auto cannot decide: none of the first {len(rejections)} rows of the "
        f"{source.section} source can be read ({counts}; the first is {first.row_id}: "
        f"{first.reason} {first.detail}). Check what wrote the file"
    )


def _no_kind(
    records: list[dict[str, Any]],
    columns: Mapping[str, str] | None,
    sampled: int,
    source: SourceSpec,
) -> str:
    pairs = sum(all(row.get(f) is not None for f in FIELDS["preference"]) for row in records)
    if pairs:
        return (
            f"dataset.format=auto cannot decide: {pairs} of the first {sampled} rows of the "
            f"{source.section} source have chosen and rejected, and the fields of no other kind. "
            f"Set dataset.format=preference to train the chosen answers"
        )
    found = sorted({str(key) for row in records for key in row})
    known = " or ".join(f"{{{', '.join(fields)}}} ({k})" for k, fields in FIELDS.items())
    absent = [
        f"{field} (column {column})"
        for field, column in (columns or {}).items()
        if not field.startswith("message.") and not any(field in row for row in records)
    ]
    return (
        f"dataset.format=auto cannot decide: none of the first {sampled} rows of the "
        f"{source.section} source has the fields of a known kind. Found "
        f"{printable(', '.join(found)) or 'no fields'}; expected {known}."
        + (f" No row has {', '.join(absent)} of dataset.columns." if absent else "")
        + " Say which columns they are, e.g. dataset.columns={prompt: COLUMN, "
        "completion: COLUMN}, or rename them in the file"
    )


# Columns -----------------------------------------------------------------------------------------


def check_columns(columns: Mapping[str, str] | None) -> None:
    """Raise a DataError for a mapping with an unknown field of ours or without a column name."""
    for field, column in (columns or {}).items():
        given = f"dataset.columns={{{field}: {column}}}"
        if field not in CANONICAL_FIELDS:
            if column in CANONICAL_FIELDS:
                hint = f"Our field comes first: dataset.columns={{{column}: {field}}}"
            else:
                close = difflib.get_close_matches(str(field).lower(), CANONICAL_FIELDS, n=1)
                hint = f"Did you mean {close[0]}?" if close else "The source's column comes second"
            raise DataError(
                f"{given}: there is no field {field}, expected one of "
                f"{', '.join(CANONICAL_FIELDS)}. {hint}"
            )
        if not isinstance(column, str) or not column:
            raise DataError(f"{given}: expected the name of a column, as in {{{field}: Body}}")


def rename(record: Mapping[str, Any], columns: Mapping[str, str] | None) -> dict[str, Any]:
    """Return the record under our names. A mapped field is read from its column only."""
    if not columns:
        return record if isinstance(record, dict) else dict(record)
    taken = {*columns, *columns.values()}
    renamed = {key: value for key, value in record.items() if key not in taken}
    for field, column in columns.items():
        value = lookup(record, column)
        if value is not MISSING:
            renamed[field] = value
    return renamed
