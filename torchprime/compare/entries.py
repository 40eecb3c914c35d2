"""The entries of parity.json and of a noise floor's file, as types.

JSON has no NaN and no infinity. In the files a `Number` that is not finite is the text "nan", "inf"
or "-inf".
"""

from __future__ import annotations

from typing import Any, NotRequired, TypedDict

Number = float | str


class PointEntry(TypedDict):
    """One quantity of two runs at one step; `relative` is their difference, `band` the limit."""

    step: int
    reference: Number
    value: Number
    relative: Number
    band: Number | None


class BeyondEntry(PointEntry):
    """The first point outside its band, and its quantity."""

    quantity: str


class QuantityEntry(TypedDict):
    """One quantity at all `steps` (a count) that both runs have; `beyond` counts those outside."""

    steps: int
    judged: bool
    beyond: int
    worst: PointEntry
    first_beyond: PointEntry | None


class CoverageEntry(TypedDict):
    """Counts: the steps with compared losses, of all steps, and the parts of the run with one."""

    steps: int
    of: int
    stretches: int
    of_stretches: int
    needed: int


class DifferenceEntry(TypedDict):
    """The first batch that differs. `what` is batch_hash or supervised_tokens."""

    step: int
    what: str
    reference: str | int
    value: str | int
    reference_has_it_at_step: NotRequired[int | None]


class DataEntry(TypedDict):
    """The comparison of the batches; `same` is None if it could not be decided."""

    same: bool | None
    steps_with_hashes: int
    steps_with_supervised_tokens: int
    first_difference: DifferenceEntry | None


class PairEntry(TypedDict):
    """A run beside the reference; `differences` has both values of each setting."""

    run: str
    verdict: str
    data: DataEntry
    coverage: CoverageEntry | None
    first_beyond: BeyondEntry | None
    quantities: dict[str, QuantityEntry]
    differences: dict[str, list[Any]]
    notes: list[str]


class RunEntry(TypedDict):
    """A run's log; the values of run.json are None if there is none."""

    label: str
    path: str
    source: str
    steps: int
    first_step: int
    last_step: int
    dtype: str | None
    backend: Any
    device: Any
    mesh: Any
    versions: Any
    supervised_tokens_per_s: Number | None
    notes: list[str]


class StepsEntry(TypedDict):
    """The number of common steps, the number judged, and the first and last of those."""

    common: int
    judged: int
    first: int
    last: int


# The band of a quantity: `relative_at_least` if it was measured, else `relative`; "from" is its
# origin.
BandEntry = TypedDict(
    "BandEntry",
    {"relative": NotRequired[float], "relative_at_least": NotRequired[float], "from": str},
)


class ParityFile(TypedDict):
    """The content of parity.json."""

    verdict: str
    reference: str
    steps: StepsEntry
    tolerances: dict[str, BandEntry | None]
    runs: list[RunEntry]
    pairs: list[PairEntry]
    notes: list[str]


class MeasuredRunEntry(TypedDict):
    """A run that a noise floor was measured on; `steps` is the number that it logged."""

    label: str
    path: str
    steps: int


class NoiseFloorFile(TypedDict):
    """The content of a noise floor's file; `spreads` are by quantity and step."""

    kind: str
    dtype: str
    factor: float
    window: int
    runs: list[MeasuredRunEntry]
    differences: list[str]
    spreads: dict[str, dict[str, float]]
