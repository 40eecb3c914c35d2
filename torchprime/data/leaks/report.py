"""Results of a leak check, for data_report.json and for the log."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class LeakPair:
    """A train row and an eval row that are duplicates, and the first characters of both."""

    train_id: str
    eval_id: str
    similarity: float  # 1.0 for exact pairs, and for near pairs with equal shingle sets
    exact: bool
    train_text: str
    eval_text: str


@dataclass(frozen=True)
class Cluster:
    """Rows of train that are duplicates of each other, directly or through others."""

    num_rows: int
    exact: bool  # all of them have the same normalized text
    row_ids: list[str]  # the first ones
    text: str


@dataclass(frozen=True)
class LeakReport:
    """The results. Counts cover all rows; pairs, clusters and groups list the first or largest.

    `crowded_rows` are rows with too many similar rows to compare them all.
    """

    threshold: float
    num_perm: int
    recall_at_threshold: float
    train_rows: int
    eval_rows: int
    exact_pairs: int
    near_pairs: int
    leaked_train_rows: int  # train rows in a pair; without them there is no leak
    leaked_eval_rows: int
    num_shared_groups: int
    exact_duplicate_rows: int  # rows of train whose normalized text occurs more than once
    exact_extra_rows: int  # the redundant ones among them
    near_duplicate_rows: int  # rows of train in a cluster of different but similar texts
    num_near_clusters: int
    frequent_shingles: int
    crowded_rows: int
    seconds: float
    pairs: list[LeakPair] = field(default_factory=list)
    shared_groups: list[str] = field(default_factory=list)
    clusters: list[Cluster] = field(default_factory=list)

    @property
    def leaks(self) -> bool:
        """Return True if any row or group of eval is in train."""
        return bool(self.leaked_eval_rows or self.num_shared_groups)

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> LeakReport:
        """Return the report that `to_dict` stored."""
        pairs = [LeakPair(**pair) for pair in content["pairs"]]
        clusters = [Cluster(**cluster) for cluster in content["clusters"]]
        return cls(**{**content, "pairs": pairs, "clusters": clusters})

    def summary(self) -> str:
        """Return one line for the log."""
        parts = [
            f"{self.leaked_eval_rows:,} of {self.eval_rows:,} eval rows are in train "
            f"({self.exact_pairs:,} exact pairs, {self.near_pairs:,} near pairs at Jaccard >= "
            f"{self.threshold:g}, {self.leaked_train_rows:,} of {self.train_rows:,} train rows)",
            f"inside train {self.exact_duplicate_rows:,} rows are in exact clusters "
            f"({self.exact_extra_rows:,} too many) and {self.near_duplicate_rows:,} in "
            f"{self.num_near_clusters:,} near clusters",
        ]
        if self.num_shared_groups:
            names = ", ".join(self.shared_groups[:3])
            parts.append(f"{self.num_shared_groups:,} groups on both sides ({names})")
        if self.crowded_rows:
            parts.append(f"{self.crowded_rows:,} rows with too many look-alikes to compare all")
        return "; ".join([*parts, f"{self.seconds:.1f} s"])
