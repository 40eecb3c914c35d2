"""What became of the rows, for data_report.json and for a person: nothing is lost silently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

SHOWN_ROW_IDS = 3


@dataclass(frozen=True)
class DataReport:
    """The account of one preparation. `rejected` maps each reason to the ids of its rows."""

    section: str
    source: str
    format: str
    format_why: str
    compute_loss_on: str
    packing: str
    truncation: str
    block_size: int
    rows: int
    examples: int
    rejected: dict[str, list[str]]
    truncated: list[str]
    boundaries: dict[str, int]
    real_tokens: int
    supervised_tokens: int
    lengths: dict[str, float]
    num_blocks: int
    packing_efficiency: float
    prepare_seconds: float
    fingerprint: str
    tokenizer_fingerprint: str

    @property
    def num_rejected(self) -> int:
        return sum(map(len, self.rejected.values()))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "num_rejected": self.num_rejected,
            "rejected_counts": {reason: len(ids) for reason, ids in self.rejected.items()},
        }

    def summary(self) -> str:
        """A few words for the log; rejected and truncated rows are always in it."""
        parts = [
            f"{self.section}: {self.rows:,} rows from {self.source} as {self.format}",
            f"{self.examples:,} examples in {self.num_blocks:,} blocks of {self.block_size:,} "
            f"({self.packing_efficiency:.1%} of slots real)",
            f"{self.supervised_tokens:,} of {self.real_tokens:,} tokens supervised",
        ]
        if self.rejected:
            parts.append(
                f"{self.num_rejected:,} rows rejected ({describe_rejected(self.rejected)})"
            )
        if self.truncated:
            parts.append(f"{len(self.truncated):,} rows truncated ({_some(self.truncated)})")
        return "; ".join([*parts, f"{self.prepare_seconds:.1f} s"])


def describe_rejected(rejected: dict[str, list[str]]) -> str:
    """Counts by reason, most frequent first, with the first row ids of each."""
    ordered = sorted(rejected.items(), key=lambda item: -len(item[1]))
    return "; ".join(f"{reason}: {len(ids):,} ({_some(ids)})" for reason, ids in ordered)


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN_ROW_IDS]) + (", ..." if len(ids) > SHOWN_ROW_IDS else "")


def length_summary(lengths: Sequence[int]) -> dict[str, float]:
    """Lengths of the examples in tokens, as they lie in the blocks."""
    values = np.asarray(lengths)
    middle = {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}
    return {
        "min": float(values.min()),
        "mean": float(values.mean()),
        **middle,
        "max": float(values.max()),
    }
