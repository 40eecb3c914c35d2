"""The entries of certificate.json, as types. `BaseChanges` has those of the check "base"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torchprime.files.hashing import FileFacts


class CheckEntry(TypedDict):
    """A `Check` in certificate.json."""

    name: str
    passed: bool | None
    detail: str
    values: Mapping[str, Any]


class CertificateFile(TypedDict):
    """The content of certificate.json; metrics that are not finite are text."""

    format_version: int
    passed: bool
    origin: str
    base_model: str | None
    step: int | None
    dtype: str
    fingerprints: dict[str, object]
    metrics: dict[str, object]
    versions: dict[str, str]
    checks: list[CheckEntry]
    files: dict[str, FileFacts]


class WeightsValues(TypedDict):
    """The numbers of the check "weights": counts of tensors and of values in them, tensors by
    dtype, and one hash of all."""

    tensors: int
    parameters: int
    dtypes: dict[str, int]
    sha256: str


class ProvedPrompt(TypedDict):
    """A prompt of the check "logits", cut to `tokens` tokens, and the logits of the likeliest next
    tokens by id."""

    text: str
    tokens: int
    likeliest_next: dict[str, float]


class LogitsValues(TypedDict):
    """The numbers of the check "logits"; the last three are fractions of the largest logit.

    `rounding_floor` is the difference that rounding alone makes, and null where it was not
    needed.
    """

    computed_by: str
    prompts: list[ProvedPrompt]
    tolerance: float
    rounding_floor: float | None
    max_difference: float
