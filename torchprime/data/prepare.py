"""The way from a source to packed blocks, with an account of every row.

Rows are read and tokenized in chunks, so that a large file never lies in memory as text.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice

from torchprime.data.packed import PackedDataset
from torchprime.data.report import DataReport, describe_rejected, length_summary
from torchprime.data.rows import Rejection, Row, open_rows
from torchprime.data.sources import SourceSpec
from torchprime.data.tokenize import Example, fit_to_block, tokenize_rows
from torchprime.data.tokenizer import Tokenizer
from torchprime.errors import DataError

CHUNK_ROWS = 4096


@dataclass
class _Account:
    """Where each row went."""

    rows: int = 0
    examples: list[Example] = field(default_factory=list)
    rejected: dict[str, list[str]] = field(default_factory=dict)

    def reject(self, rejection: Rejection) -> None:
        self.rejected.setdefault(rejection.reason, []).append(rejection.row_id)


def prepare_dataset(
    source: SourceSpec,
    tokenizer: Tokenizer,
    *,
    block_size: int,
    format: str = "auto",
    compute_loss_on: str = "completion",
    packing: str = "first_fit",
    truncation: str = "drop",
    max_examples: int | None = None,
    max_rejected_fraction: float = 0.05,
    section: str = "dataset",
) -> tuple[PackedDataset, DataReport]:
    """Read, tokenize and pack; at most `max_examples` examples, and no rows beyond those needed."""
    started = time.perf_counter()
    decision, rows = open_rows(source, format, section)
    account = _Account()
    for chunk in _chunks(rows, account, max_examples):
        _tokenize_chunk(chunk, account, tokenizer, compute_loss_on, block_size, truncation)
    _check(account, source, section, max_rejected_fraction)

    packed = PackedDataset.from_examples(
        account.examples, block_size=block_size, pad_id=tokenizer.pad_id, packing=packing
    )
    report = DataReport(
        section=section,
        source=source.describe(),
        format=decision.kind,
        format_why=decision.why,
        compute_loss_on=compute_loss_on,
        packing=packing,
        truncation=truncation,
        block_size=block_size,
        rows=account.rows,
        examples=packed.num_examples,
        rejected=account.rejected,
        truncated=[example.row_id for example in account.examples if example.truncated],
        boundaries=dict(Counter(example.boundary for example in account.examples)),
        real_tokens=packed.real_tokens,
        supervised_tokens=packed.supervised_tokens,
        lengths=length_summary([len(example.ids) for example in account.examples]),
        num_blocks=packed.num_blocks,
        packing_efficiency=packed.efficiency,
        prepare_seconds=time.perf_counter() - started,
        fingerprint=packed.fingerprint(),
        tokenizer_fingerprint=tokenizer.fingerprint(),
    )
    return packed, report


def _chunks(
    rows: Iterator[Row | Rejection], account: _Account, max_examples: int | None
) -> Iterator[list[Row | Rejection]]:
    """Chunks until the rows end or there are enough examples; never more rows than are missing."""
    while True:
        missing = CHUNK_ROWS if max_examples is None else max_examples - len(account.examples)
        chunk = list(islice(rows, min(CHUNK_ROWS, missing)))
        if not chunk:
            return
        yield chunk


def _tokenize_chunk(
    chunk: list[Row | Rejection],
    account: _Account,
    tokenizer: Tokenizer,
    compute_loss_on: str,
    block_size: int,
    truncation: str,
) -> None:
    account.rows += len(chunk)
    usable: list[Row] = []
    for row in chunk:
        if isinstance(row, Rejection):
            account.reject(row)
        else:
            usable.append(row)
    for result in tokenize_rows(usable, tokenizer, compute_loss_on):
        fitted = result
        if isinstance(result, Example):
            fitted = fit_to_block(result, block_size, truncation)
        if isinstance(fitted, Rejection):
            account.reject(fitted)
        else:
            account.examples.append(fitted)


def _check(
    account: _Account, source: SourceSpec, section: str, max_rejected_fraction: float
) -> None:
    """Too many rejected rows, or no example at all, end the run with the counts by reason."""
    rejected = account.rows - len(account.examples)
    where = f"{section} ({source.describe()})"
    advice = (
        "Correct the rows; for rows longer than block_size raise dataset.block_size or set "
        "dataset.truncation=right"
    )
    if not account.examples:
        raise DataError(
            f"{where}: none of the {account.rows:,} rows can be used: "
            f"{describe_rejected(account.rejected)}. {advice}"
        )
    if rejected / account.rows > max_rejected_fraction:
        raise DataError(
            f"{where}: {rejected:,} of {account.rows:,} rows ({rejected / account.rows:.1%}) are "
            f"rejected, dataset.max_rejected_fraction allows {max_rejected_fraction:.1%}: "
            f"{describe_rejected(account.rejected)}. {advice}, or raise "
            f"dataset.max_rejected_fraction if losing them is meant"
        )
