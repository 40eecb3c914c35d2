"""The train/eval split: the side of a row is a function of the row alone.

A hash of the row's group, or of its text if it has no group, decides the side. So a row stays on
its side when others are added, removed or reordered. Rows with the same text are always together,
and so are the rows of one group: a thread, a document, a tenant.

A split by time reads all rows once and evaluates on the latest part of them. A group is as late as
its latest row, so no group is on both sides and no training row is later than an evaluation row.
(Equal texts of different times and groups can be on both sides; data/leaks finds those.)
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np

from torchprime.data.messages.read import Message
from torchprime.data.rows.read import Row
from torchprime.errors import ConfigError, DataError

Side = Literal["train", "eval"]
_DATE = re.compile(r"\d{4}-\d{2}-\d{2}")


@dataclass(frozen=True)
class SplitRule:
    """The rule: `fraction` of the rows, or of the groups, is evaluated; `seed` varies the draw.

    With `by_time`, rows at or after `threshold` are for evaluation, and `latest` maps each group's
    hash to the time of its latest row. `TimeSplit.rule` fills both.
    """

    fraction: float
    seed: int
    by_time: bool = False
    threshold: float | None = None
    latest: Mapping[int, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ConfigError(
                f"dataset.eval_fraction={self.fraction} leaves one side of the split "
                f"empty, expected a number between 0 and 1, e.g. 0.05. For no evaluation rows "
                f"leave it out"
            )

    def side_of(self, row: Row, key_text: str) -> Side:
        """Return the side of a row whose `content_text` is `key_text`.

        Raises:
            DataError: the rule is by time and the row has no usable time.
        """
        if self.by_time:
            return "eval" if self._time_of(row) >= self._known_threshold() else "train"
        kind, key = ("text", key_text) if row.group is None else ("group", row.group)
        return "eval" if _hash(kind, key, self.seed) / 2**64 < self.fraction else "train"

    def _time_of(self, row: Row) -> float:
        if row.group is None:
            return parse_time(row)[0]
        latest = self.latest.get(_hash("group", row.group, self.seed))
        return parse_time(row)[0] if latest is None else latest

    def _known_threshold(self) -> float:
        assert self.threshold is not None, "a rule by time comes from TimeSplit.rule"
        return self.threshold


class TimeSplit:
    """A collector of all rows' times; its rule puts the latest `fraction` into evaluation.

    It stores a number for each row without a group, and a hash, a time and a count for each group.
    """

    def __init__(self, fraction: float, seed: int = 0) -> None:
        self._rule = SplitRule(fraction, seed)
        self._times: list[float] = []
        self._groups: dict[int, tuple[float, int]] = {}  # hash -> latest time, rows
        self._form: tuple[str, str] | None = None  # the first row's, and its id

    def add(self, row: Row) -> None:
        """Record the time of one row.

        Raises:
            DataError: no time, an unreadable one, or one of another form than in the rows before.
        """
        time, form = parse_time(row)
        self._form = self._form or (form, row.row_id)
        if form != self._form[0]:
            raise DataError(
                f"{row.row_id}: the time {row.time!r} is {form}, but {self._form[1]} has "
                f"{self._form[0]}, and the two can't be ordered. Give all rows times of one form"
            )
        if row.group is None:
            self._times.append(time)
            return
        key = _hash("group", row.group, self._rule.seed)
        latest, count = self._groups.get(key, (time, 0))
        self._groups[key] = (max(latest, time), count + 1)

    def rule(self) -> SplitRule:
        """Return the rule for the rows seen. Rows of the threshold's time are all in evaluation.

        Raises:
            DataError: one side would have no rows.
        """
        of_groups = [np.full(count, time) for time, count in self._groups.values()]
        times = np.sort(np.concatenate([np.array(self._times, float), *of_groups]))
        if len(times) < 2:
            check_sides(len(times), 0)
        wanted = max(1, round(self._rule.fraction * len(times)))
        threshold = float(times[-min(wanted, len(times) - 1)])
        num_train = int(np.searchsorted(times, threshold))
        if num_train == 0:
            raise DataError(
                f"the split by time leaves train without rows: with groups kept together, all "
                f"{len(times):,} rows are as late as those that belong to evaluation. Lower "
                f"dataset.eval_fraction={self._rule.fraction}, use a finer time, or split "
                f"without time"
            )
        latest = {key: time for key, (time, _) in self._groups.items()}
        return SplitRule(self._rule.fraction, self._rule.seed, True, threshold, latest)


def plan_split(
    rows: Iterable[Row], fraction: float, seed: int = 0, by_time: bool = False
) -> SplitRule:
    """Read the rows once, return the rule for them, and check that neither side is empty.

    Raises:
        ConfigError: a fraction that is not between 0 and 1.
        DataError: a side without rows, or times that can't be used.
    """
    if by_time:
        times = TimeSplit(fraction, seed)
        for row in rows:
            times.add(row)
        return times.rule()
    rule = SplitRule(fraction, seed)
    counts = {"train": 0, "eval": 0}
    for row in rows:
        counts[rule.side_of(row, content_text(row))] += 1
    check_sides(counts["train"], counts["eval"])
    return rule


def check_sides(num_train: int, num_eval: int) -> None:
    """Refuse a split that leaves one side without rows.

    Raises:
        DataError: with the counts and what to do.
    """
    if num_train and num_eval:
        return
    change = "Raise" if num_train else "Lower"
    raise DataError(
        f"the split gives {num_train:,} rows to train and {num_eval:,} to eval, expected some on "
        f"both sides. {change} dataset.eval_fraction, set another split seed, give more rows "
        f"(or more groups: a group is never divided), or name an eval source"
    )


def parse_time(row: Row) -> tuple[float, str]:
    """Return a row's time as a number that orders it, and the form it was given in.

    Numbers stay as they are; texts are ISO 8601 dates or dates with times, in seconds since 1970.

    Raises:
        DataError: anything else.
    """
    time = row.time
    if isinstance(time, (int, float)) and not isinstance(time, bool):
        if math.isfinite(time):
            return float(time), "a number"
    elif isinstance(time, str) and _DATE.match(time.strip()):
        try:
            moment = datetime.fromisoformat(time.strip().upper())
        except ValueError:
            pass
        else:
            if moment.tzinfo is not None:
                return moment.timestamp(), "ISO 8601 with a time zone"
            utc = moment.replace(tzinfo=UTC)
            return utc.timestamp(), "ISO 8601 without a time zone"
    raise DataError(
        f"{row.row_id}: the time {time!r} can't be used for a split by time, expected a finite "
        f"number or ISO 8601 text such as 2024-05-31 or 2024-05-31T12:00:00Z. Correct or remove "
        f"the row, or name another column for the time"
    )


def content_text(row: Row) -> str:
    """Return a row's text: prompt and completion, or its messages' roles and contents.

    Names, ids, weights and other fields are not in it: rows that differ only in those are the same
    row for a split and for the leak check.
    """
    if not row.messages:
        return row.prompt + "\n" + row.completion
    return "\n".join(part for message in row.messages for part in _message_parts(message))


def _message_parts(message: Message) -> list[str]:
    parts = [message.role, _as_text(message.template.get("content"))]
    parts.append(_as_text(message.template.get("reasoning_content")))
    for call in message.template.get("tool_calls") or ():
        # Not the call's id, which is new each time the same conversation is exported.
        parts.append(_as_text(call.get("function", call) if isinstance(call, Mapping) else call))
    return [part for part in parts if part]


def _as_text(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _hash(kind: str, key: str, seed: int) -> int:
    """Return a 64-bit hash of these three; the kind separates groups from texts."""
    secret = hashlib.sha256(str(seed).encode()).digest()
    message = f"{kind}\0{key}".encode("utf-8", "surrogatepass")
    digest = hashlib.blake2b(message, digest_size=8, key=secret).digest()
    return int.from_bytes(digest, "little")
