"""The account of all rows, used or not, for data_report.json and for a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, TypedDict

import numpy as np
import numpy.typing as npt

from torchprime.data.shared.notes import NotedFacts, describe_noted

SHOWN_ROW_IDS = 3


class SourceReport(TypedDict):
    """The account of one source, as data_report.json has it. All but `source` are counts.

    `rows` does not include rows on the other side of a split; the used examples do not include
    those beyond the source's share of a mixture.
    """

    source: str
    rows: int
    chats: int  # rows of messages among them
    other_side: int
    examples: int
    used_examples: int
    used_tokens: int


SourceCount = Literal["rows", "chats", "other_side", "examples", "used_examples", "used_tokens"]


def new_source_report(source: str) -> SourceReport:
    """Return the account of a source of which nothing is read yet."""
    return {
        "source": source,
        "rows": 0,
        "chats": 0,
        "other_side": 0,
        "examples": 0,
        "used_examples": 0,
        "used_tokens": 0,
    }


@dataclass(frozen=True)
class DataReport:
    """The account of one preparation. `rejected` maps each reason to the ids of its rows."""

    section: str
    source: str
    format: str
    format_why: str
    template: str | None
    compute_loss_on: str
    packing: str
    truncation: str
    block_size: int
    split: str | None
    rows: int
    examples: int
    sources: dict[str, SourceReport]  # by the name of the mixture's part; "" if there is only one
    rejected: dict[str, list[str]]
    rejected_details: dict[str, str]  # of the first row of each reason
    truncated: list[str]
    boundaries: dict[str, int]
    unused_keys: dict[str, NotedFacts]  # by path; RowNotes describes them
    noticed: dict[str, NotedFacts]
    real_tokens: int
    supervised_tokens: int
    lengths: dict[str, float]
    num_blocks: int
    packing_efficiency: float
    fingerprint: str
    tokenizer_fingerprint: str
    template_fingerprint: str | None
    prepare_seconds: float = 0.0
    cached: bool = False
    # by column; FormatDecision describes them
    like_input: dict[str, str] = field(default_factory=dict)
    average: str = "tokens"  # task.loss.average, which the weights of tokens follow

    @property
    def num_rejected(self) -> int:
        return sum(map(len, self.rejected.values()))

    def to_dict(self) -> dict[str, object]:
        return asdict(self) | {
            "num_rejected": self.num_rejected,
            "rejected_counts": {reason: len(ids) for reason, ids in self.rejected.items()},
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> DataReport:
        """Return the report that `to_dict` stored, here or in version 0.1.0."""
        names = {spec.name for spec in fields(cls)}
        # Version 0.1.0 did not record keys.
        content = {"unused_keys": {}, "noticed": {}, **content}
        return cls(**{name: value for name, value in content.items() if name in names})

    @property
    def has_chats(self) -> bool:
        """Return True if the chat template shaped any row."""
        return any(source["chats"] for source in self.sources.values())

    @property
    def unused(self) -> dict[str, int]:
        """The examples that a mixture leaves unused, by source."""
        counts = {n: s["examples"] - s["used_examples"] for n, s in self.sources.items()}
        return {name: count for name, count in counts.items() if count}

    def warnings(self) -> list[str]:
        """Return one sentence for each fact that a person should check before training."""
        where = "" if self.section == "dataset" else f"{self.section}: "
        return [
            f"{where}column {column} looks like input but is not used, e.g. {example}: "
            "map it (dataset.columns) or put it into the question"
            for column, example in self.like_input.items()
        ]

    def summary(self) -> str:
        """Return a few words for the log; rejected and truncated rows are always included."""
        parts = [
            f"{self.section}: {self.rows:,} rows from {self.source} as {self.format}",
            f"{self.examples:,} examples in {self.num_blocks:,} blocks of {self.block_size:,} "
            f"({self.packing_efficiency:.1%} of slots real)",
            f"{self.supervised_tokens:,} of {self.real_tokens:,} tokens supervised",
        ]
        if self.average == "examples":
            parts.append("every example's loss is its mean over tokens (task.loss.average)")
        if self.template is not None and self.has_chats:
            parts.insert(1, f"chat template {self.template}")
        for name, count in self.unused.items():
            parts.append(f"{count:,} examples of {name} beyond its share are not used")
        if self.rejected:
            reasons = describe_rejected(self.rejected, self.rejected_details)
            parts.append(f"{self.num_rejected:,} rows rejected ({reasons})")
        if self.truncated:
            parts.append(f"{len(self.truncated):,} rows truncated ({_some(self.truncated)})")
        if self.unused_keys:
            parts.append(f"keys not used: {describe_noted(self.unused_keys)}")
        if self.noticed:
            parts.append(f"noticed: {describe_noted(self.noticed)}")
        done = "found prepared" if self.cached else "prepared"
        return "; ".join([*parts, f"{done} in {self.prepare_seconds:.1f} s"])


def describe_rejected(rejected: dict[str, list[str]], details: dict[str, str]) -> str:
    """Return counts by reason, most frequent first, with the first row ids of each."""
    ordered = sorted(rejected.items(), key=lambda item: -len(item[1]))
    return "; ".join(
        f"{reason}: {len(ids):,} ({_some(ids)}"
        + (f"; the first: {details[reason]})" if details.get(reason) else ")")
        for reason, ids in ordered
    )


def _some(ids: Sequence[str]) -> str:
    return ", ".join(ids[:SHOWN_ROW_IDS]) + (", ..." if len(ids) > SHOWN_ROW_IDS else "")


def length_summary(lengths: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, float]:
    """Return statistics of the examples' lengths in tokens, as they are in the blocks."""
    values = np.asarray(lengths)
    middle = {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)}
    return {
        "min": float(values.min()),
        "mean": float(values.mean()),
        **middle,
        "max": float(values.max()),
    }
