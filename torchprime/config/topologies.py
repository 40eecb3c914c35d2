"""TPU slices that a step can be compiled for, under the cloud's names.

v5e and v6e names count chips (v5e is `v5litepod` in accelerator types), v5p names count cores, two
per chip. With `dcn_mesh` several slices make one run; the name is that of one slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchprime.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A chip type; speeds as published by the vendor, memory as libtpu 0.0.21 allocates it."""

    name: str
    hbm_bytes: int
    flops: float  # dense bf16 operations per second
    hbm_bytes_per_s: float
    ici_bytes_per_s: float  # out of a chip over all its links, one way


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9),
        Chip("v6e", int(31.25 * GIB), 918e12, 1600e9, 400e9),
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9),
    )
}


@dataclass(frozen=True)
class Topology:
    """A slice: its chip type, the arrangement of its chips, and the number of chips per host."""

    name: str
    chip: Chip
    shape: tuple[int, ...]
    host_shape: tuple[int, int, int]

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def libtpu_name(self) -> str:
        """The name in libtpu's spelling: v6e:2x4."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"


def _slices() -> dict[str, Topology]:
    flat = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
    flat[256] = (16, 16)
    deep = {8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4)}
    deep |= {256: (4, 4, 8), 512: (4, 8, 8)}
    found = {}
    for kind, shapes in (("v5e", flat), ("v6e", flat), ("v5p", deep)):
        for number, shape in shapes.items():
            # Up to 8 flat chips are one machine; larger slices consist of machines with 4.
            whole = kind != "v5p" and number <= 8
            host = (shape[0], shape[1], 1) if whole else (2, 2, 1)
            found[f"{kind}-{number}"] = Topology(f"{kind}-{number}", CHIPS[kind], shape, host)
    return found


TOPOLOGIES = _slices()


def topology(name: str, key: str = "compile_only") -> Topology:
    """Return the slice of this name.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    found = TOPOLOGIES.get(name.lower().replace("v5litepod", "v5e"))
    if found is None:
        known = ", ".join(TOPOLOGIES)
        raise ConfigError(
            f"{key}: given {name!r}, expected a TPU slice: {known} (v5p names count cores, two a "
            f"chip). Set {key}=v6e-8."
        )
    return found


def check_devices(slice_: Topology, mesh: dict[str, int], slices: int) -> None:
    """Check that the mesh takes exactly the available chips.

    Args:
        mesh: size of each axis over all slices.
        slices: number of slices of this name in the run: the product of `dcn_mesh`.

    Raises:
        ConfigError: the numbers differ; the message has an override that fits.
    """
    wanted, there = math.prod(mesh.values()), slice_.chips * slices
    if wanted == there:
        return
    axes = " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"
    kept = math.prod(size for axis, size in mesh.items() if axis != "fsdp")
    fix = f"Set ici_mesh.fsdp={there // kept}" if there % kept == 0 else "Change ici_mesh"
    fitting = [name for name, t in TOPOLOGIES.items() if t.chips * slices == wanted]
    other = f", or compile_only={' or '.join(fitting)}" if fitting else ""
    many = f"{slices} slices of it have" if slices > 1 else "it has"
    raise ConfigError(
        f"compile_only={slice_.name}: {many} {there} chips, but ici_mesh x dcn_mesh ({axes}) takes "
        f"{wanted}. {fix}{other}."
    )
