"""The kinds of a decoder's layers: which keys a layer attends to, and by which rope.

    config.json (sliding_window, layer_types, ...)  ->  one LayerKind for each layer
    the kinds of all layers                         ->  repeating groups, which a scan loops over

Reference: transformers 5 reads the same keys.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torchprime.errors import CheckpointError
from torchprime.models.config_values import ConfigValues
from torchprime.models.families import Family
from torchprime.models.rope_config import ORIGINAL, PARTIAL, Rope, RopeTraits, read_rope

FULL, SLIDING = "full_attention", "sliding_attention"
# transformers' defaults for an absent key.
WINDOW, FIRST_WINDOWED, NO_ROPE_INTERVAL = 4096, 28, 4
LARGEST = 2**40
LONGEST_PERIOD = 32


class LayerKind(NamedTuple):
    """The properties in which the layers of one model may differ.

    Attributes:
        window: of the attention, in positions; None for full causal attention.
        rope: the index of the layer's rope in `Architecture.ropes`; None: queries and keys are not
            rotated.
    """

    window: int | None = None
    rope: int | None = 0


def read_layer_kinds(values: ConfigValues, family: Family, layers: int) -> tuple[LayerKind, ...]:
    """Read the kind of every layer from a config, as transformers does.

    Raises:
        CheckpointError: a key of a wrong type or size; a list that does not fit the model.
    """
    window = _window(values, family)
    types = _types(values, layers)
    if family.window in ("upper", "no_rope"):
        if window is None and types is not None and SLIDING in types:
            raise values.fault(
                "layer_types",
                f"no {SLIDING}, since there is no window (sliding_window, use_sliding_window)",
            )
        return (_upper if family.window == "upper" else _some_rotated)(
            values, types, window, layers
        )
    if family.window == "pattern":
        return _pattern(values, family, types, layers)
    windowed = family.window == "all" and window is not None
    if (
        types is not None
        and window is not None
        and types != [SLIDING if windowed else FULL] * layers
    ):
        raise values.fault("layer_types", "null: this family has one kind of layer")
    return (LayerKind(window if windowed else None),) * layers


def _window(values: ConfigValues, family: Family) -> int | None:
    """Return sliding_window. If absent, transformers uses 4096 in these families; null means no
    window."""
    null = "sliding_window" in values.content and "sliding_window" not in values
    window = None if null else values.integer("sliding_window", WINDOW, most=LARGEST)
    if family.window in ("upper", "no_rope"):
        return window if values.flag("use_sliding_window") else None
    return window if family.window == "all" or "sliding_window" in values else None


def _types(values: ConfigValues, layers: int) -> list[str] | None:
    """Return layer_types, of which transformers takes no notice in some families and vLLM in
    none."""
    types = values.get("layer_types")
    if types is None:
        return None
    known = isinstance(types, list) and all(kind in (FULL, SLIDING) for kind in types)
    if not known or len(types) != layers:
        raise values.fault(
            "layer_types",
            f"a list of {layers} times {FULL} or {SLIDING} (num_hidden_layers={layers})",
        )
    return types


def _upper(
    values: ConfigValues, types: list[str] | None, window: int | None, layers: int
) -> tuple[LayerKind, ...]:
    """Return the kinds of a family whose layers from `max_window_layers` on have a window."""
    first = values.integer("max_window_layers", FIRST_WINDOWED, least=0, most=LARGEST)
    if window is None:
        return (LayerKind(),) * layers
    if types is None:
        types = [SLIDING if layer >= first else FULL for layer in range(layers)]
    return tuple(LayerKind(window if kind == SLIDING else None) for kind in types)


def _some_rotated(
    values: ConfigValues, types: list[str] | None, window: int | None, layers: int
) -> tuple[LayerKind, ...]:
    """Return the kinds of a family with layers that do not rotate, which may have a window."""
    interval = values.integer("no_rope_layer_interval", NO_ROPE_INTERVAL, most=LARGEST)
    rotated = [(layer + 1) % interval != 0 for layer in range(layers)]
    if "no_rope_layers" in values:  # 1: the layer rotates, whatever the key's name says
        given = values.get("no_rope_layers")
        known = isinstance(given, list) and all(
            type(each) is int and each in (0, 1) for each in given
        )
        if not known or len(given) < layers:
            raise values.fault("no_rope_layers", f"a list of at least {layers} times 0 or 1")
        rotated = [each == 1 for each in given[:layers]]
    if types is None:
        types = [FULL if window is None or each else SLIDING for each in rotated]
    return tuple(
        LayerKind(window if kind == SLIDING else None, 0 if each else None)
        for kind, each in zip(types, rotated, strict=True)
    )


def _pattern(
    values: ConfigValues, family: Family, types: list[str] | None, layers: int
) -> tuple[LayerKind, ...]:
    """Return the kinds of a family in which every so many layers one has no window."""
    if types is None:
        every, key = family.full_every, family.full_every_key
        if key is not None and key in values:
            every = values.integer(key)
        full = [every > 0 and (layer + 1) % every == 0 for layer in range(layers)]
        types = [FULL if each else SLIDING for each in full]
    window = None
    if SLIDING in types:
        window = values.integer("sliding_window", WINDOW, most=LARGEST)
        if "sliding_window" in values.content and "sliding_window" not in values:
            raise values.fault("sliding_window", f"a number, since layers are {SLIDING}")
    local = 0 if family.local_rope is None else 1
    return tuple(
        LayerKind(window, local) if kind == SLIDING else LayerKind(None, 0) for kind in types
    )


def read_ropes(
    values: ConfigValues, context: int, family: Family, head_dim: int
) -> tuple[Rope, ...]:
    """Read the rope of all layers; or those of full layers and of layers with a window.

    transformers 5 has an object for each kind of layer in `rope_parameters`. transformers 4 has
    `rope_theta` and `rope_scaling` for full layers, and the other base under a key of its own.

    Args:
        context: max_position_embeddings.

    Raises:
        CheckpointError: see `read_rope`.
    """
    if family.local_rope is None:
        return (read_rope(values, context, family.rope, head_dim),)
    nested = values.inner("rope_parameters") or ConfigValues({}, values.where, "rope_parameters.")
    if stray := [key for key in nested.content if key not in (FULL, SLIDING)]:
        raise nested.fault(stray[0], f"an object for each kind of layer, {FULL} and {SLIDING}")

    scaling = values.inner("rope_scaling")
    if scaling is not None and "type" in scaling and "rope_type" not in scaling:
        raise scaling.fault("type", "null and rope_type instead, which transformers 5 reads here")

    def rope_of(kind: str, traits: RopeTraits, theta: str, *scaled: str) -> Rope:
        found = nested.inner(kind)
        said = None if found is None else found.get("rope_theta")
        if said is None and theta == "rope_theta":
            said = traits.theta  # which transformers 5 takes for layers with a window
        if kind == SLIDING and said is not None and values.get(theta) not in (None, said):
            raise values.fault(theta, f"{said!r:.60}, as for layers with a window")
        own = {key: values.get(key) for key in (*scaled, ORIGINAL, PARTIAL)}
        own["rope_theta"] = values.get(theta)
        own["rope_parameters"] = None if found is None else found.content
        names = {"rope_theta": theta, "rope_parameters": f"rope_parameters.{kind}"}
        return read_rope(ConfigValues(own, values.where, names=names), context, traits, head_dim)

    full = rope_of(FULL, family.rope, "rope_theta", "rope_scaling")
    local = rope_of(SLIDING, family.local_rope, family.local_theta)
    if family.local_theta == "rope_theta" and full.theta != local.theta:
        raise CheckpointError(
            f"{values.where}: rope_theta is {full.theta:g} for full layers (rope_scaling or "
            f"rope_parameters) and {local.theta:g} for layers with a window, expected one base, as "
            "transformers 4 reads it."
        )
    if not (full.truncate and local.truncate):
        raise CheckpointError(
            f"{values.where}: truncate is false in rope_scaling or rope_parameters, expected true "
            "or null: transformers does not read it in families with a rope for each kind of layer."
        )
    return full, local


class Group(NamedTuple):
    """Layers that repeat: `period` layers after another, `repeats` times."""

    first: int
    period: int
    repeats: int

    def stack(self, place: int) -> range:
        """Return the layers at one place of the period."""
        return range(self.first + place, self.first + self.period * self.repeats, self.period)


def repeating_groups(kinds: Sequence[Hashable]) -> list[Group]:
    """Divide layers into groups with the fewest different bodies, then the fewest groups.

    Gemma 3's 26 layers are 4 times (5 local, 1 global) and 2 local ones. A loop's body has
    `period` layers, so the work of a compiler grows with the sum of the periods, not with the
    depth. A group that does not repeat has one layer.
    """
    count = len(kinds)
    # By the number of layers before: bodies, groups, and the last group of the best division.
    best: list[tuple[int, int, Group | None]] = [(0, 0, None)]
    best += [(count + 1, 0, None)] * count
    for first in range(count):
        for period in range(1, min(LONGEST_PERIOD, count - first) + 1):
            end = first + period
            while end < count and kinds[end] == kinds[end - period]:
                end += 1
            for repeats in range(1 if period == 1 else 2, (end - first) // period + 1):
                bodies, groups = best[first][0] + period, best[first][1] + 1
                after = first + period * repeats
                if (bodies, groups) <= best[after][:2]:  # if equal, the longer group first
                    best[after] = bodies, groups, Group(first, period, repeats)
    found: list[Group] = []
    while count:
        last = best[count][2]
        assert last is not None
        found.append(last)
        count = last.first
    return found[::-1]
