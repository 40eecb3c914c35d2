"""Rotary position settings of a config.json, in the spellings of transformers 4 and 5.

    transformers 5    rope_parameters: {rope_type, rope_theta, factor, ...}
    transformers 4    rope_theta, partial_rotary_factor, rope_scaling: {rope_type or type, ...}

A file may have both, for both readers. transformers 5 then takes all of `rope_scaling` and nothing
of `rope_parameters`, transformers 4 the other way round. So two spellings that differ in any value
are two models: they are refused by name. Absent keys get transformers 5's defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torchprime.errors import CheckpointError
from torchprime.models.config_values import ConfigValues

THETA = 10_000.0
ORIGINAL = "original_max_position_embeddings"
PARTIAL = "partial_rotary_factor"
# Keys of a kind besides rope_type and rope_theta; those with a default may be absent.
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
    "yarn": (
        *("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"),
        *("truncate", ORIGINAL),
    ),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor", ORIGINAL),
}
# The key inside the object that scales queries by their position.
QUERY_GROWTH = "llama_4_scaling_beta"
# vLLM 0.32 reads only this object beside the rope's, transformers only the key inside.
VLLM_GROWTH = "llama_4_scaling"
# Other keys that the object may have. The last four change nothing: a note on the training, a copy,
# and the shares of positions that are equal in a text.
KNOWN = {
    *("rope_type", "type", "rope_theta", PARTIAL, QUERY_GROWTH, ORIGINAL),
    *(key for keys in KINDS.values() for key in keys),
    *("finetuned", "max_position_embeddings", "mrope_section", "mrope_interleaved"),
}
LARGEST = 2**40  # of a context in tokens
LARGEST_FACTOR = 1000  # of attention: beyond it scores are no numbers
# The fields of a Rope in version 0.1.0.
FIRST_FIELDS = (
    *("theta", "kind", "factor", "low_freq_factor", "high_freq_factor"),
    "original_max_position",
)


@dataclass(frozen=True)
class RopeTraits:
    """The differences between families in their rope settings.

    Attributes:
        theta: rope_theta where config.json has none.
        partial: the same for partial_rotary_factor; None: the family rotates whole heads.
        original: the same for `original_max_position_embeddings` beside the object; None: the
            context.
        kinds: the kinds that the family's class in transformers accepts.
        other_names: kinds by the names that older files of the family have for them.
        query_growth: the family scales queries by their position.
    """

    theta: float = THETA
    partial: float | None = None
    original: int | None = None
    kinds: tuple[str, ...] = tuple(KINDS)
    other_names: Mapping[str, str] = field(default_factory=dict)
    query_growth: bool = False


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: base and, for long contexts, the scaling of frequencies.

    Attributes:
        factor: of the context's growth.
        original_max_position: the context of the pretraining; for `dynamic` the one that the
            config has now.
        partial: the rotated part of each head.
        attention_factor: of cosines and sines; None: computed from the other fields.
        short_factor: divides each frequency, for lengths up to `original_max_position`.
        long_factor: the same above it.
        query_growth: a query at position p is scaled by 1 + this * log(1 + p //
            `original_max_position`), as in Llama 4; None: not scaled.
    """

    theta: float = THETA
    kind: str = "default"  # one of KINDS
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192
    partial: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()
    query_growth: float | None = None

    def rotated(self, head_dim: int) -> int:
        """Return how many numbers of a head are rotated, from the first on."""
        return int(head_dim * self.partial)

    def described(self) -> dict[str, Any]:
        """Return the settings for a fingerprint. Fields that version 0.1.0 did not have are left
        out at their defaults, so the fingerprints of its runs stay valid."""
        plain = Rope()
        return {
            name: value
            for name, value in asdict(self).items()
            if name in FIRST_FIELDS or value != getattr(plain, name)
        }

    @property
    def attention_scale(self) -> float:
        """The factor of cosines and sines, by which `yarn` and `longrope` scale the scores of
        attention in long contexts."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.kind == "yarn":
            if self.mscale and self.mscale_all_dim:
                return self._mscale(self.mscale) / self._mscale(self.mscale_all_dim)
            return self._mscale(1.0)
        if self.kind == "longrope" and self.factor > 1:
            return math.sqrt(1 + math.log(self.factor) / math.log(self.original_max_position))
        return 1.0

    def _mscale(self, multiplier: float) -> float:
        return 0.1 * multiplier * math.log(self.factor) + 1.0 if self.factor > 1 else 1.0


# The field of a Rope -> its key in config.json, where they differ.
KEYS = {
    "theta": "rope_theta",
    "kind": "rope_type",
    "original_max_position": ORIGINAL,
    "partial": PARTIAL,
    "query_growth": QUERY_GROWTH,
}
FIELDS = {key: name for name, key in KEYS.items()}


def read_rope(config: ConfigValues, context: int, traits: RopeTraits, head_dim: int) -> Rope:
    """Read the rope settings of a config.

    Args:
        context: max_position_embeddings, by which a kind scales if nothing else is said.
        head_dim: for the size of the rotated part.

    Raises:
        CheckpointError: an unsupported type, a value of a wrong type or size, spellings that
            differ.
    """
    rope = _read_spellings(config, _Reader(config, context, traits, head_dim))
    if VLLM_GROWTH in config and config.get(VLLM_GROWTH) != (growth := _growth_for_vllm(rope)):
        raise config.fault(VLLM_GROWTH, f"{growth or 'null'}, by the rope settings")
    return rope


def _read_spellings(config: ConfigValues, reader: _Reader) -> Rope:
    """Return the rope that all spellings agree on."""
    new, old = config.inner("rope_parameters"), config.inner("rope_scaling")
    if new is None and old is None and "default" not in reader.traits.kinds:
        kinds = ", ".join(reader.traits.kinds)
        raise config.fault("rope_parameters", f"an object with one of the rope types {kinds}")
    if new is None:
        return reader.read(old or ConfigValues({}, config.where, "rope_scaling."))
    new_rope = reader.read(new)
    if old is not None:
        older = "rope_theta and rope_scaling"
        _refuse_difference(new_rope, reader.read(old), config.where, older)
        return new_rope
    beside = {
        name: value
        for name, value in (("theta", "rope_theta"), ("partial", PARTIAL))
        if value in config
    }
    values: dict[str, Any] = {name: config.number(key) for name, key in beside.items()}
    _refuse_difference(
        new_rope, replace(new_rope, **values), config.where, " and ".join(beside.values())
    )
    return new_rope


def _growth_for_vllm(rope: Rope) -> dict[str, Any] | None:
    """Return the growth of queries in vLLM's spelling."""
    if rope.query_growth is None:
        return None
    return {"beta": rope.query_growth, ORIGINAL: rope.original_max_position}


@dataclass(frozen=True)
class _Reader:
    """Reader of one spelling. The fields are `read_rope`'s arguments."""

    config: ConfigValues
    context: int
    traits: RopeTraits
    head_dim: int

    def read(self, keys: ConfigValues) -> Rope:
        """Return the rope of one spelling."""
        for key in keys.content:
            if isinstance(keys.get(key), dict):
                raise keys.fault(key, "one rope for all layers, not one for each kind of layer")
            if key not in KNOWN and keys.get(key) not in (None, False):
                raise keys.fault(key, "null: no supported kind of rope has this key")
        if keys.get(QUERY_GROWTH) and not self.traits.query_growth:
            raise keys.fault(QUERY_GROWTH, "null: this family is supported without it")
        rope = Rope(self._theta(keys), self._kind(keys), partial=self._partial(keys))
        if rope.kind == "default":
            return rope
        if rope.kind == "longrope":
            return self._longrope(rope, keys)
        rope = replace(rope, factor=keys.number("factor"))
        if rope.kind == "dynamic":
            rotated = rope.rotated(self.head_dim)
            if rotated < 4:
                raise self._too_few(f"{keys.path}rope_type=dynamic", rotated)
            return replace(rope, original_max_position=self.context)
        if rope.kind == "llama3":
            return self._llama3(rope, keys)
        return self._yarn(rope, keys) if rope.kind == "yarn" else rope

    def _theta(self, keys: ConfigValues) -> float:
        return keys.number("rope_theta", self.config.number("rope_theta", self.traits.theta))

    def _partial(self, keys: ConfigValues) -> float:
        if self.traits.partial is None:
            for place in (keys, self.config):
                if place.number(PARTIAL, 1.0) != 1.0:
                    raise place.fault(PARTIAL, "1.0 or null: this family rotates whole heads")
            return 1.0
        # transformers uses the family's default for an absent key, and whole heads for null.
        default = 1.0 if PARTIAL in self.config.content else self.traits.partial
        partial = keys.number(PARTIAL, self.config.number(PARTIAL, default))
        rotated = int(self.head_dim * partial)
        if partial > 1 or rotated % 2 or not rotated:
            raise keys.fault(
                PARTIAL,
                f"a number up to 1 that leaves an even number of a head's {self.head_dim} "
                "(hidden_size / num_attention_heads, or head_dim) to rotate",
            )
        return partial

    def _kind(self, keys: ConfigValues) -> str:
        newer, older = keys.get("rope_type"), keys.get("type")
        if newer is not None and older is not None and newer != older:
            raise keys.fault("rope_type", f"what {keys.path}type says ({older!r:.100})")
        kind = "default" if newer is None and older is None else newer if older is None else older
        if isinstance(kind, str):
            kind = self.traits.other_names.get(kind, kind)
        if kind not in self.traits.kinds:
            raise CheckpointError(
                f"{keys.where}: the rope type {kind!r:.100} ({keys.path}rope_type) is not "
                f"supported; supported are {', '.join(self.traits.kinds)}."
            )
        return kind

    def _too_few(self, what: str, rotated: int) -> CheckpointError:
        return CheckpointError(
            f"{self.config.where}: {what} rotates {rotated} numbers of each head, expected at "
            "least 4 (head_dim, or hidden_size / num_attention_heads)."
        )

    def _original(self, keys: ConfigValues) -> int:
        """Return the context of the pretraining.

        transformers 5 prefers the key outside of the object; transformers 4 reads only the one
        inside, except for `longrope`.
        """
        default = self.context if self.traits.original is None else self.traits.original
        outside = self.config.integer(ORIGINAL, default, most=LARGEST)
        inside = keys.integer(ORIGINAL, outside, most=LARGEST)
        said = ORIGINAL in self.config or self.traits.original is not None
        if said and inside != outside:
            raise keys.fault(ORIGINAL, f"what {ORIGINAL} says beside it ({outside})")
        return inside

    def _llama3(self, rope: Rope, keys: ConfigValues) -> Rope:
        low = keys.number("low_freq_factor")
        high = keys.number("high_freq_factor")
        if high <= low:
            raise keys.fault("high_freq_factor", f"more than {keys.path}low_freq_factor ({low:g})")
        return replace(
            rope,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=self._original(keys),
        )

    def _yarn(self, rope: Rope, keys: ConfigValues) -> Rope:
        if rope.theta == 1:
            raise self.config.fault("rope_theta", "another number than 1 for yarn")
        if "truncate" in keys.content and keys.get("truncate") is None:
            raise keys.fault("truncate", "true or false")
        return replace(
            rope,
            beta_fast=keys.number("beta_fast", 32.0),
            beta_slow=keys.number("beta_slow", 1.0),
            attention_factor=_optional(keys, "attention_factor"),
            mscale=_optional(keys, "mscale", equal=True),
            mscale_all_dim=_optional(keys, "mscale_all_dim", equal=True),
            truncate=keys.flag("truncate", True),
            query_growth=self._query_growth(keys),
            original_max_position=self._original(keys),
        )

    def _query_growth(self, keys: ConfigValues) -> float | None:
        if not self.traits.query_growth:
            return None
        if (found := keys.number(QUERY_GROWTH, equal=True)) > LARGEST_FACTOR:
            raise keys.fault(QUERY_GROWTH, f"a number up to {LARGEST_FACTOR:,}")
        return found

    def _longrope(self, rope: Rope, keys: ConfigValues) -> Rope:
        original, size = self._original(keys), rope.rotated(self.head_dim) // 2
        factor = keys.number("factor", self.context / original)
        attention = _optional(keys, "attention_factor")
        if attention is None and factor > 1 and original < 2:
            raise CheckpointError(
                f"{keys.where}: {ORIGINAL} is {original}, expected at least 2 for longrope without "
                f"{keys.path}attention_factor."
            )
        return replace(
            rope,
            factor=factor,
            attention_factor=attention,
            short_factor=_factors(keys, "short_factor", size),
            long_factor=_factors(keys, "long_factor", size),
            original_max_position=original,
        )


def _optional(keys: ConfigValues, key: str, *, equal: bool = False) -> float | None:
    if key not in keys:
        return None
    if (found := keys.number(key, equal=equal)) > LARGEST_FACTOR:
        raise keys.fault(key, f"a number up to {LARGEST_FACTOR:,}")
    return found


def _factors(keys: ConfigValues, key: str, size: int) -> tuple[float, ...]:
    """Return a list of numbers, one for each pair that is rotated."""
    given = keys.get(key)
    if isinstance(given, list) and len(given) == size and all(map(_is_factor, given)):
        return tuple(float(each) for each in given)
    raise keys.fault(
        key,
        f"a list of {size} numbers above 0, one for each rotated pair of a head "
        "(head_dim, or hidden_size / num_attention_heads; partial_rotary_factor)",
    )


def _is_factor(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 < value < 1e30


def _refuse_difference(new: Rope, old: Rope, where: str, older: str) -> None:
    said, other = asdict(new), asdict(old)
    differ = [
        f"{KEYS.get(field, field)} ({said[field]!s:.100} and {other[field]!s:.100})"
        for field in said
        if said[field] != other[field]
    ]
    if differ:
        raise CheckpointError(
            f"{where}: rope_parameters and {older} differ in {', '.join(differ)}, and readers "
            "disagree on which counts. Make them agree, or remove one."
        )


def both_spellings(rope: Rope, context: int, *, partial: bool) -> dict[str, Any]:
    """Return the keys of config.json for a rope, in the spellings of transformers 4 and 5 and, if
    queries grow, of vLLM.

    Args:
        context: max_position_embeddings, from which `longrope` gets its factor if it has none.
        partial: the family has a partial_rotary_factor.
    """
    scaling: dict[str, Any] = {"rope_type": rope.kind}
    for key in KINDS[rope.kind]:
        value = getattr(rope, FIELDS.get(key, key))
        if value is not None:
            scaling[key] = list(value) if isinstance(value, tuple) else value
    result: dict[str, Any] = {}
    if rope.query_growth is not None:
        scaling[QUERY_GROWTH] = rope.query_growth
        result[VLLM_GROWTH] = _growth_for_vllm(rope)
    result |= {
        "rope_theta": rope.theta,
        "rope_scaling": None if rope.kind == "default" else scaling,
        "rope_parameters": {"rope_theta": rope.theta, **scaling},
    }
    if rope.kind == "longrope":
        result["rope_scaling"] = _for_phi3(scaling, rope, context)
        result[ORIGINAL] = rope.original_max_position
    if partial:
        result[PARTIAL] = result["rope_parameters"][PARTIAL] = rope.partial
    return result


def _for_phi3(scaling: Mapping[str, Any], rope: Rope, context: int) -> dict[str, Any]:
    """Return `longrope` in the spelling of transformers 4, whose Phi-3 accepts three keys only.

    The original context stands beside the object. The factor is the ratio of the two contexts; if
    the source has another one, its effect is written as the attention_factor.
    """
    names = {"rope_type": "type"}
    kept = {names.get(k, k): v for k, v in scaling.items() if k not in (ORIGINAL, "factor")}
    if rope.factor != context / rope.original_max_position:
        kept |= {"factor": rope.factor, "attention_factor": rope.attention_scale}
    return kept
