"""Rotary position settings of a config.json, in the spellings of transformers 4 and 5.

    transformers 5    rope_parameters: {rope_type, rope_theta, factor, ...}
    transformers 4    rope_theta, rope_scaling: {rope_type or type, factor, ...}

A file may have both, for both readers. transformers 5 then takes all of `rope_scaling` and nothing
of `rope_parameters`, transformers 4 the other way round. So two spellings that differ in any value
are two models: they are refused by name. Absent keys get transformers 5's defaults.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TypedDict

from torchprime.errors import CheckpointError
from torchprime.models.config_values import ConfigValues

THETA = 10_000.0
KINDS = ("default", "linear", "llama3")
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and, for long contexts, the scaling of frequencies."""

    theta: float = THETA
    kind: str = "default"  # default, linear, llama3
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


# The field of a Rope -> its key in config.json.
KEYS = {
    "theta": "rope_theta",
    "kind": "rope_type",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_max_position": ORIGINAL,
}


def read_rope(config: ConfigValues, max_position_embeddings: int) -> Rope:
    """Read the rope settings of a config.

    Args:
        max_position_embeddings: the context, by which `llama3` scales if nothing else is said.

    Raises:
        CheckpointError: an unsupported type, a value of a wrong type or size, spellings that
            differ.
    """
    new, old = config.inner("rope_parameters"), config.inner("rope_scaling")
    old_rope = _read(old or ConfigValues({}, config.where, "rope_scaling."), config)
    old_rope = _with_original(old_rope, old, config, max_position_embeddings)
    if new is None:
        return old_rope
    new_rope = _with_original(_read(new, config), new, config, max_position_embeddings)
    if old is not None:
        _refuse_difference(new_rope, old_rope, config.where, "rope_theta and rope_scaling")
    elif "rope_theta" in config:
        beside = replace(new_rope, theta=config.number("rope_theta"))
        _refuse_difference(new_rope, beside, config.where, "rope_theta")
    return new_rope


def _read(keys: ConfigValues, config: ConfigValues) -> Rope:
    """Return one spelling, except the original context."""
    for key in keys.content:
        if isinstance(keys.get(key), dict):
            raise keys.fault(key, "one rope for all layers, not one for each kind of layer")
    kind = _kind(keys)
    theta = config.number("rope_theta", THETA)
    theta = keys.number("rope_theta", theta)
    for place in (keys, config):
        if place.number(PARTIAL, 1.0) != 1.0:
            raise place.fault(PARTIAL, "1.0 or null: other values are not supported")
    if kind == "default":
        return Rope(theta)
    factor = keys.number("factor")
    if kind == "linear":
        return Rope(theta, kind, factor)
    low = keys.number("low_freq_factor")
    high = keys.number("high_freq_factor")
    if high <= low:
        raise keys.fault("high_freq_factor", f"more than {keys.path}low_freq_factor ({low:g})")
    return Rope(theta, kind, factor, low, high)


def _kind(keys: ConfigValues) -> str:
    newer, older = keys.get("rope_type"), keys.get("type")
    if newer is not None and older is not None and newer != older:
        raise keys.fault("rope_type", f"what {keys.path}type says ({older!r:.100})")
    kind = "default" if newer is None and older is None else newer if older is None else older
    if kind not in KINDS:
        raise CheckpointError(
            f"{keys.where}: the rope type {kind!r:.100} ({keys.path}rope_type) is not supported; "
            f"supported are {', '.join(KINDS)}."
        )
    return kind


def _with_original(
    rope: Rope, keys: ConfigValues | None, config: ConfigValues, max_position_embeddings: int
) -> Rope:
    """Return the rope with the context that it was trained for, which only `llama3` uses.

    transformers 5 prefers the key outside of the object; transformers 4 reads only the one inside.
    """
    if rope.kind != "llama3" or keys is None:
        return rope
    largest = 2**40
    outside = config.integer(ORIGINAL, max_position_embeddings, most=largest)
    inside = keys.integer(ORIGINAL, outside, most=largest)
    if ORIGINAL in config and inside != outside:
        raise keys.fault(ORIGINAL, f"what {ORIGINAL} says beside it ({outside})")
    return replace(rope, original_max_position=inside)


def _refuse_difference(new: Rope, old: Rope, where: str, older: str) -> None:
    said, other = asdict(new), asdict(old)
    differ = [
        f"{key} ({said[field]} and {other[field]})"
        for field, key in KEYS.items()
        if said[field] != other[field]
    ]
    if differ:
        raise CheckpointError(
            f"{where}: rope_parameters and {older} differ in {', '.join(differ)}, and readers "
            "disagree on which counts. Make them agree, or remove one."
        )


class ScalingKeys(TypedDict, total=False):
    """The scaling of frequencies as a config.json writes it: its type, and that type's own keys.

    The three factors have no unit; `original_max_position_embeddings` is in tokens.
    """

    rope_type: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


class RopeParameters(ScalingKeys):
    """The same with the base, as transformers 5 writes it."""

    rope_theta: float


class RopeKeys(TypedDict):
    """The rope keys of a config.json in both spellings; without scaling `rope_scaling` is null."""

    rope_theta: float
    rope_scaling: ScalingKeys | None
    rope_parameters: RopeParameters


def both_spellings(rope: Rope) -> RopeKeys:
    """Return the keys of config.json for a rope, in the spellings of transformers 4 and 5."""
    scaling: ScalingKeys = {"rope_type": rope.kind}
    if rope.kind != "default":
        scaling["factor"] = rope.factor
    if rope.kind == "llama3":
        scaling["low_freq_factor"] = rope.low_freq_factor
        scaling["high_freq_factor"] = rope.high_freq_factor
        scaling[ORIGINAL] = rope.original_max_position
    return {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
