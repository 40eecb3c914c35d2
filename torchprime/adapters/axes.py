"""Sharding of an adapter's parameters, derived from the sharding of the weight that it adapts.

A [R, I] is cut like the weight's inputs, B [O, R] and the magnitude [O] like its outputs. The rank
is never cut: it is small, and the product over it would need a sum over devices. Parts of a
quantized weight are cut like the weight, in whole blocks.

B is thus whole along an axis that cuts only the weight's inputs, such as fsdp, and A along one that
cuts only its outputs. At a low rank that takes little memory and saves a gather for each layer.
With `cut_further` they are cut along those axes, too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

Dim = str | Sequence[str] | None
RawSpec = Sequence[Dim]


def adapter_patterns(
    parameters: Mapping[str, RawSpec], cut_further: Collection[str] = ()
) -> dict[str, RawSpec]:
    """Return a table's parameter patterns with those of adapters and of quantized weights, for
    every weight of two dims.

    Args:
        parameters: name pattern -> axes of each dim, for the model without adapters.
        cut_further: axes that cut both A and B where they cut the weight. They have to cut the
            batch: A and B are gathered for their products, as the weight is.
    """
    derived: dict[str, RawSpec] = dict(parameters)
    for pattern, spec in parameters.items():
        module, _, last = pattern.rpartition(".")
        if last not in ("weight", "bias"):
            continue
        derived[f"{module}.base_layer.{last}"] = spec
        if last == "weight" and len(spec) == 2:
            outputs, inputs = spec
            derived[f"{module}.lora_A.weight"] = (None, _joined(inputs, outputs, cut_further))
            derived[f"{module}.lora_B.weight"] = (_joined(outputs, inputs, cut_further), None)
            derived[f"{module}.lora_magnitude_vector"] = (outputs,)
            derived[f"{module}.lora_dropout.number"] = ()
            for layer in (module, f"{module}.base_layer"):
                parts = _quantized_parts(outputs, inputs)
                derived |= {f"{layer}.{part}": cut for part, cut in parts.items()}
    return derived


def _joined(own: Dim, other: Dim, cut_further: Collection[str]) -> Sequence[str]:
    """Return a dim's own axes, and those of the other dim that are in cut_further."""
    return [*_axes(own), *(axis for axis in _axes(other) if axis in cut_further)]


def _axes(dim: Dim) -> Sequence[str]:
    return () if dim is None else (dim,) if isinstance(dim, str) else dim


def _quantized_parts(outputs: Dim, inputs: Dim) -> dict[str, RawSpec]:
    """Return the axes of each part of a quantized weight [O, I]; `int8.Int8`, `nf4.Nf4`."""
    return {
        "codes": (outputs, inputs),
        "scales": (outputs,),
        "packed": (outputs, inputs, None),
        "scale_codes": (outputs, inputs),
        "scale_scales": (None,),
        "offset": (),
    }
