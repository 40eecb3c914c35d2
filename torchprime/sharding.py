"""The sharding table: patterns of parameter and activation names, mapped to mesh axes.

It is independent of devices. A pattern is a dotted name in which `*` stands for exactly one part
(for example a layer number). Each dim of a matching tensor gets an axis, a list of axes or null. A
parameter that no pattern matches, or a large one that is whole on every device, is an error,
because silent replication wastes memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torchprime.errors import ConfigError

# For each dim the axes that shard it, () for none: (("tensor",), ("fsdp",)).
Spec = tuple[tuple[str, ...], ...]
RawSpec = Sequence[str | Sequence[str] | None]


def _normalize(spec: RawSpec) -> Spec:
    return tuple(
        () if dim is None else (dim,) if isinstance(dim, str) else tuple(dim) for dim in spec
    )


def matches(pattern: str, name: str) -> bool:
    """Return True if a pattern is a dotted name; `*` stands for exactly one part."""
    parts, wanted = name.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(
        w in ("*", p) for p, w in zip(parts, wanted, strict=True)
    )


@dataclass(frozen=True)
class ShardingTable:
    """Name patterns -> axes, for parameters and activations.

    `parameters` are matched by parameter name, `activations` by the name of the module whose output
    they are (and `batch` for the batch itself).
    """

    parameters: Mapping[str, RawSpec]
    activations: Mapping[str, RawSpec]
    max_unsharded_params: int = 1_000_000

    def find(self, kind: Mapping[str, RawSpec], name: str) -> Spec | None:
        """Return the spec of the first pattern that matches, or None."""
        for pattern, spec in kind.items():
            if matches(pattern, name):
                return _normalize(spec)
        return None

    def batch_axes(self) -> tuple[str, ...]:
        """Return the axes that shard the batch dim of every activation."""
        spec = self.find(self.activations, "batch")
        return spec[0] if spec else ()

    def parameter_specs(
        self, shapes: Mapping[str, Sequence[int]], mesh: Mapping[str, int]
    ) -> dict[str, Spec]:
        """Return the spec of every parameter, checked against its shape and the mesh.

        Args:
            shapes: full (unsharded) shape by Hugging Face name.
            mesh: number of devices along each axis.

        Raises:
            ConfigError: names that match no pattern, an unknown axis, a dim not divisible by its
                axes, or a large parameter left whole on every device.
        """
        self._check_axes(mesh)
        specs = {name: self.find(self.parameters, name) for name in shapes}
        unmatched = [name for name, spec in specs.items() if spec is None]
        if unmatched:
            raise ConfigError(
                f"sharding.parameters: no pattern matches {_some(unmatched)}. Add a pattern for "
                "each (`*` stands for one part of a dotted name); null keeps a dim whole."
            )
        found = {name: spec for name, spec in specs.items() if spec is not None}
        for name, spec in found.items():
            _check_shape(name, shapes[name], spec, mesh)
        self._check_large(found, shapes, mesh)
        return found

    def check_activations(self, modules: Iterable[str]) -> None:
        """Check that every pattern names a module of the model, and that the batch has a pattern.

        Raises:
            ConfigError: names the patterns that would have no effect.
        """
        if "batch" not in self.activations:
            raise ConfigError(
                "sharding.activations has no `batch`: every device would compute every row. Add "
                "batch: [[data, fsdp], null]."
            )
        names = list(modules)
        idle = [
            pattern
            for pattern in self.activations
            if pattern != "batch" and not any(matches(pattern, name) for name in names)
        ]
        if idle:
            raise ConfigError(
                f"sharding.activations: {_some(idle)} match no module of the model, so they would "
                "do nothing. Correct or remove them."
            )

    def _check_axes(self, mesh: Mapping[str, int]) -> None:
        for kind, table in (("parameters", self.parameters), ("activations", self.activations)):
            for pattern, raw in table.items():
                for axis in (axis for dim in _normalize(raw) for axis in dim):
                    if axis not in mesh:
                        raise ConfigError(
                            f"sharding.{kind}.{pattern}: {axis!r} is no mesh axis; "
                            f"the axes are {', '.join(mesh)}."
                        )

    def _check_large(
        self,
        specs: Mapping[str, Spec],
        shapes: Mapping[str, Sequence[int]],
        mesh: Mapping[str, int],
    ) -> None:
        splittable = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
        whole = [
            f"{name} {list(shapes[name])}"
            for name, spec in specs.items()
            if splittable > 1
            and shard_count(spec, mesh) == 1
            and math.prod(shapes[name]) > self.max_unsharded_params
        ]
        if whole:
            raise ConfigError(
                f"sharding.parameters leave {_some(whole)} whole on every device, though the mesh "
                f"has fsdp x tensor = {splittable} and the limit is sharding.max_unsharded_params="
                f"{self.max_unsharded_params}. Give a dim an axis, or raise the limit."
            )


def shard_count(spec: Spec, mesh: Mapping[str, int]) -> int:
    """Return the number of different pieces of a tensor with this spec."""
    return math.prod(mesh[axis] for dim in spec for axis in dim)


def _check_shape(name: str, shape: Sequence[int], spec: Spec, mesh: Mapping[str, int]) -> None:
    if len(spec) != len(shape):
        raise ConfigError(
            f"sharding.parameters: {name} has {len(shape)} dims {list(shape)}, "
            f"but its pattern gives axes for {len(spec)}."
        )
    for index, (size, axes) in enumerate(zip(shape, spec, strict=True)):
        pieces = math.prod(mesh[axis] for axis in axes)
        if size % pieces:
            product = " x ".join(f"{axis}={mesh[axis]}" for axis in axes)
            raise ConfigError(
                f"{name} {list(shape)}: dim {index} of size {size} is not divisible by {product} "
                f"= {pieces}. Use a mesh whose axes divide it, or other axes for it."
            )


def _some(names: Iterable[str], limit: int = 5) -> str:
    listed = list(names)
    more = f" and {len(listed) - limit} more" if len(listed) > limit else ""
    return ", ".join(listed[:limit]) + more
