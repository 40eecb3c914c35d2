"""The records of a run: one `StepRecord` per logged step, one `EvalRecord` per held-out evaluation.

The loop fills a record on the host after the numbers have left the device. The writers turn it into
a line of `metrics.jsonl`, TensorBoard scalars and a line on the terminal. `compare` reads the lines
back.

JSON has no NaN and no infinity; Python's `json` writes them unquoted, which other readers refuse.
In a line such a number is therefore `null`, and the key `nonfinite` holds its value:
`{"loss": null, ..., "nonfinite": {"loss": "nan"}}` with `nan`, `inf` or `-inf`. A `null` that
`nonfinite` does not name was never known (`mfu` on a CPU). Lines without such numbers have no
`nonfinite`. `from_json` restores the floats.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypedDict


class GradedScore(TypedDict):
    """A grader's score in a record: the fields of evaluation.intervals.Score."""

    value: float
    count: int
    low: float
    high: float
    interval: Literal["wilson", "bootstrap"]


@dataclass(frozen=True)
class StepRecord:
    """A logged step. Times and rates are means over the steps since the last record."""

    kind: ClassVar[str] = "train"

    step: int  # finished updates, so the first is 1
    epoch: float  # finished passes over the data, in fractions
    loss: float
    grad_norm: float  # before clipping
    lr: float  # used in this step
    supervised_tokens: int  # this and the next three: of this step's batch
    real_tokens: int
    slot_tokens: int
    batch_hash: str
    step_seconds: float
    supervised_tokens_per_s: float
    slot_tokens_per_s: float
    mfu: float | None  # None: the chip's peak is not known
    device_memory_bytes: int | None
    host_memory_bytes: int
    compiles: int | None  # graphs compiled since the start
    # Mean loss by source, None for a source without tokens in the batch; only with several sources.
    source_losses: dict[str, float | None] | None = None
    terms: dict[str, float] | None = None  # parts of the loss and other numbers of the step, if any

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StepRecord:
        """Make it from a line of metrics.jsonl. Raise a TypeError if a value is missing."""
        return cls(**_fields(cls, values))

    def to_dict(self) -> dict[str, Any]:
        values = dataclasses.asdict(self)
        for name in NESTED:
            if values[name] is None:
                del values[name]
        return {"kind": self.kind, **values}


@dataclass(frozen=True)
class EvalRecord:
    """Held-out metrics after `step` finished updates; step 0 is before the first.

    Attributes:
        train_loss: mean of the training losses logged since the evaluation before; None for none.
        source_losses: the held-out loss by source, where there are several.
        scores: by grader, where answers were graded.
        generated_tokens, generate_seconds: of those answers.
        share_of_run: all evaluations' part of the seconds since the run started.
    """

    kind: ClassVar[str] = "eval"

    step: int
    eval_loss: float
    eval_supervised_tokens: int
    seconds: float
    train_loss: float | None = None
    source_losses: dict[str, float | None] | None = None
    scores: dict[str, GradedScore] | None = None
    generated_tokens: int | None = None
    generate_seconds: float | None = None
    share_of_run: float | None = None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> EvalRecord:
        """Make it from a line of metrics.jsonl. Raise a TypeError if a value is missing."""
        return cls(**_fields(cls, values))

    @property
    def eval_perplexity(self) -> float:
        try:
            return math.exp(self.eval_loss)
        except OverflowError:
            return math.inf

    def to_dict(self) -> dict[str, Any]:
        values = {name: v for name, v in dataclasses.asdict(self).items() if v is not None}
        return {"kind": self.kind, **values, "eval_perplexity": self.eval_perplexity}


@dataclass(frozen=True)
class SpikeRecord:
    """A step whose loss or gradient norm was above its limit, also if it was not a logged one.

    Attributes:
        skipped: its update was left out.
    """

    kind: ClassVar[str] = "spike"

    step: int
    loss: float
    grad_norm: float
    loss_limit: float
    grad_norm_limit: float
    batch_hash: str
    skipped: bool

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SpikeRecord:
        """Make it from a line of metrics.jsonl. Raise a TypeError if a value is missing."""
        return cls(**_fields(cls, values))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}

    def describe(self) -> str:
        """Return its line for the terminal."""
        done = "its update was skipped" if self.skipped else "its update was made"
        return (
            f"spike: loss {self.loss:.4f} (limit {self.loss_limit:.4f})  "
            f"grad_norm {self.grad_norm:.2f} (limit {self.grad_norm_limit:.2f})  "
            f"batch {self.batch_hash[:12]}  {done}"
        )


@dataclass(frozen=True)
class CheckpointRecord:
    """A completed checkpoint. Training paused for `stall_seconds` of `write_seconds`."""

    kind: ClassVar[str] = "checkpoint"

    step: int
    name: str
    bytes: int
    stall_seconds: float
    write_seconds: float  # from the step's end to the last rename

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class TimeRecord:
    """The uses of one start's wall clock until now: a line of times.jsonl (goodput.py).

    Attributes:
        step: finished updates.
        first_step: those before this start.
        began: when this start began, in seconds since 1970.
        seconds: by use; they add up to `wall_seconds`.
    """

    kind: ClassVar[str] = "time"

    step: int
    first_step: int
    began: float
    wall_seconds: float
    seconds: dict[str, float]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TimeRecord:
        """Make it from a line of times.jsonl. Raise a TypeError if a value is missing."""
        return cls(**_fields(cls, values))

    def to_dict(self) -> dict[str, Any]:
        return {"kind": self.kind, **dataclasses.asdict(self)}


def _fields(
    record: type[StepRecord | EvalRecord | SpikeRecord | TimeRecord], values: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values that are fields of the record."""
    names = {field.name for field in dataclasses.fields(record)}
    return {name: value for name, value in values.items() if name in names}


NESTED = ("source_losses", "terms")  # the fields whose numbers are nested one level down
Record = StepRecord | EvalRecord | SpikeRecord | CheckpointRecord


def to_json(record: Record | TimeRecord) -> str:
    """Return one line of valid JSON without the line end."""
    values = record.to_dict()
    nonfinite: dict[str, str | dict[str, str]] = {
        name: str(value)
        for name, value in values.items()
        if isinstance(value, float) and not math.isfinite(value)
    }
    values |= dict.fromkeys(nonfinite)
    for field in NESTED:
        inner = values.get(field) or {}
        bad = {s: str(v) for s, v in inner.items() if v is not None and not math.isfinite(v)}
        if bad:
            values[field] = inner | dict.fromkeys(bad)
            nonfinite[field] = bad
    if nonfinite:
        values["nonfinite"] = nonfinite
    return json.dumps(values, allow_nan=False)


def from_json(line: str) -> dict[str, Any]:
    """Return the dict that a line was made from, NaN and infinity included.

    Raises:
        ValueError: the line is no record.
    """
    try:
        values = json.loads(line)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}")
    try:
        nonfinite = values.pop("nonfinite", {})
        for field in NESTED:
            for name, value in nonfinite.pop(field, {}).items():
                values[field][name] = float(value)
        return values | {name: float(value) for name, value in nonfinite.items()}
    except (TypeError, AttributeError, KeyError, OverflowError) as error:
        raise ValueError(f"nonfinite is not as the trainer writes it: {error}") from error
