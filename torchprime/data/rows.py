"""What a row means: three kinds of record become one form, a prompt and a completion.

    prompt_completion  {"prompt": ..., "completion": ...}   as they are
    question_answer    {"question": ..., "answer": ...}     the question inside QUESTION_PROMPT
    text               {"text": ...}                        no prompt; everything is completion

`auto` decides once, on the first rows, and refuses to guess between kinds. A record that lacks
what its kind needs is a `Rejection` with a reason, to be counted, not an exception.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from torchprime.data.sources import SourceSpec, read_rows
from torchprime.errors import DataError

FIELDS: dict[str, tuple[str, ...]] = {
    "prompt_completion": ("prompt", "completion"),
    "question_answer": ("question", "answer"),
    "text": ("text",),
}
QUESTION_PROMPT = "Question:\n{question}\n\n\nAnswer:\n"
SAMPLE_ROWS = 100


@dataclass(frozen=True)
class Row:
    """One record in the common form. A text row has prompt "" and everything in completion."""

    row_id: str
    kind: str
    prompt: str
    completion: str


@dataclass(frozen=True)
class Rejection:
    """A record that cannot be used. The reason groups; the detail is this record's own."""

    row_id: str
    reason: str
    detail: str = ""


@dataclass(frozen=True)
class FormatDecision:
    """The kind all rows are read as, and why."""

    kind: str
    why: str


def decide_format(
    sample: Sequence[dict[str, Any]], requested: str, section: str = "dataset"
) -> FormatDecision:
    """Take the requested kind, or the one kind whose fields the sampled rows have."""
    if requested in FIELDS:
        return FormatDecision(requested, f"dataset.format={requested}")
    if requested != "auto":
        raise DataError(
            f"dataset.format={requested} is not known, expected auto, {', '.join(FIELDS)}"
        )
    kinds = Counter(_kinds_of(row) for row in sample)
    unknown = kinds.pop("", 0)
    if len(kinds) == 1 and (kind := next(iter(kinds))) in FIELDS:
        fitting = kinds[kind]
        fields = " and ".join(FIELDS[kind])
        return FormatDecision(kind, f"{fitting} of the first {len(sample)} rows have {fields}")
    if kinds:
        counts = ", ".join(f"{kind}: {n} rows" for kind, n in kinds.most_common())
        raise DataError(
            f"dataset.format=auto cannot decide: the first {len(sample)} rows of the {section} "
            f"source are a mixture ({counts}{f', none: {unknown} rows' if unknown else ''}). Set "
            f"dataset.format to one of {', '.join(FIELDS)}"
        )
    found = sorted({str(key) for row in sample for key in row})
    raise DataError(
        f"dataset.format=auto cannot decide: none of the first {len(sample)} rows of the "
        f"{section} source has the fields of a known kind. Found "
        f"{', '.join(found) or 'no fields'}; expected {_known_kinds()}. "
        f"Rename the fields in the file"
    )


def _kinds_of(row: dict[str, Any]) -> str:
    """The kinds whose fields this row has, e.g. "text" or "question_answer + text"."""
    return " + ".join(k for k, fields in FIELDS.items() if all(f in row for f in fields))


def _known_kinds() -> str:
    return " or ".join(f"{{{', '.join(fields)}}} ({kind})" for kind, fields in FIELDS.items())


def read_row(row_id: str, record: dict[str, Any], kind: str) -> Row | Rejection:
    """One record as a Row, or why not."""
    values: list[str] = []
    for field in FIELDS[kind]:
        if field not in record:
            found = ", ".join(sorted(map(str, record))) or "nothing"
            return Rejection(row_id, f"field {field} is missing", f"found {found}")
        value = record[field]
        if value is None:
            return Rejection(row_id, f"field {field} is null")
        if not isinstance(value, str):
            return Rejection(row_id, f"field {field} is not a string", type(value).__name__)
        if not value.strip() and field != "prompt":
            return Rejection(row_id, f"field {field} is empty")
        if not _is_unicode(value):
            return Rejection(row_id, f"field {field} is not valid Unicode", "a lone surrogate")
        values.append(value)
    if kind == "text":
        return Row(row_id, kind, "", values[0])
    if kind == "question_answer":
        return Row(row_id, kind, QUESTION_PROMPT.format(question=values[0]), values[1])
    return Row(row_id, kind, values[0], values[1])


def _is_unicode(value: str) -> bool:
    """JSON can spell half a surrogate pair; no tokenizer takes it."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def open_rows(
    source: SourceSpec, requested: str, section: str = "dataset"
) -> tuple[FormatDecision, Iterator[Row | Rejection]]:
    """Decide the kind on the first rows, then stream all of them, those first ones included."""
    records = read_rows(source, section)
    sample = list(islice(records, SAMPLE_ROWS))
    decision = decide_format([record for _, record in sample], requested, section)

    def stream() -> Iterator[Row | Rejection]:
        for part in (sample, records):
            for row_id, record in part:
                yield read_row(row_id, record, decision.kind)

    return decision, stream()


def load_rows(
    source: SourceSpec, limit: int, *, format: str = "auto", section: str = "eval"
) -> list[Row]:
    """The first `limit` usable rows, as prompts and completions, to show answers to a person."""
    _, rows = open_rows(source, format, section)
    return list(islice((row for row in rows if isinstance(row, Row)), limit))
