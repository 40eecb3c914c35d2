"""Sharding of an adapter's parameters, derived from the sharding of the weight that it adapts.

A [R, I] is cut like the weight's inputs, B [O, R] and the magnitude [O] like its outputs. The rank
is never cut: it is small, and the product over it would need a sum over devices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

RawSpec = Sequence[str | Sequence[str] | None]


def adapter_patterns(parameters: Mapping[str, RawSpec]) -> dict[str, RawSpec]:
    """Return a table's parameter patterns with those of adapters, for every weight of two dims.

    Args:
        parameters: name pattern -> axes of each dim, for the model without adapters.
    """
    derived: dict[str, RawSpec] = dict(parameters)
    for pattern, spec in parameters.items():
        module, _, last = pattern.rpartition(".")
        if last not in ("weight", "bias"):
            continue
        derived[f"{module}.base_layer.{last}"] = spec
        if last == "weight" and len(spec) == 2:
            outputs, inputs = spec
            derived[f"{module}.lora_A.weight"] = (None, inputs)
            derived[f"{module}.lora_B.weight"] = (outputs, None)
            derived[f"{module}.lora_magnitude_vector"] = (outputs,)
            derived[f"{module}.lora_dropout.number"] = ()
    return derived
