"""TPU slices that a step can be compiled for, under the cloud's names.

v5e and v6e names count chips (v5e is `v5litepod` in accelerator types). v5p and v7x names count
cores, two per chip (v7x is `tpu7x` in accelerator types). A program sees both cores of a v5p chip
as one device, and those of a v7x chip as two. With `dcn_mesh` several slices make one run; the
name is that of one slice.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torchprime.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """A chip type, all figures of one device of it (on v7x half a chip).

    Speeds are as published by the vendor, memory is what libtpu leaves to a program (0.0.21; 0.0.52
    for v7x). The clock follows from the peak: `flops` is two operations of each cell of the matrix
    units in every cycle (as if 4 units of 128 x 128 on v5e, 8 on v5p, 4 of 256 x 256 on v6e and
    v7x). By libtpu's own cycles a large product reaches 87 to 98% of it.
    """

    name: str
    hbm_bytes: int
    flops: float  # dense bf16 operations per second
    hbm_bytes_per_s: float
    ici_bytes_per_s: float  # out of it over all its links, one way
    clock_hz: float
    per_chip: int = 1  # devices
    compiles: bool = True  # libtpu 0.0.21, the version for torch_xla 2.9.0, knows it


CHIPS: dict[str, Chip] = {
    chip.name: chip
    for chip in (
        Chip("v5e", int(15.75 * GIB), 197e12, 819e9, 200e9, 1.5e9),
        Chip("v6e", int(31.25 * GIB), 918e12, 1600e9, 400e9, 1.75e9),
        Chip("v5p", int(95.74 * GIB), 459e12, 2765e9, 600e9, 1.75e9),
        # A chip: 2307e12 operations, 7380e9 and 600e9 bytes per second.
        Chip("v7x", int(94.74 * GIB), 2307e12 / 2, 7380e9 / 2, 600e9 / 2, 2.2e9, 2, compiles=False),
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
        """The devices that a mesh takes: chips, on v7x their halves."""
        return math.prod(self.shape) * self.chip.per_chip

    @property
    def libtpu_name(self) -> str:
        """The name in libtpu's spelling: v6e:2x4."""
        name = "tpu7x" if self.chip.name == "v7x" else self.chip.name
        return f"{name}:{'x'.join(map(str, self.shape))}"


def _slices() -> dict[str, Topology]:
    flat = {1: (1, 1), 4: (2, 2), 8: (2, 4), 16: (4, 4), 32: (4, 8), 64: (8, 8), 128: (8, 16)}
    flat[256] = (16, 16)
    deep = {8: (2, 2, 1), 16: (2, 2, 2), 32: (2, 2, 4), 64: (2, 4, 4), 128: (4, 4, 4)}
    deep |= {256: (4, 4, 8), 512: (4, 8, 8)}
    found = {}
    for kind, shapes in (("v5e", flat), ("v6e", flat), ("v5p", deep), ("v7x", deep)):
        for number, shape in shapes.items():
            # Up to 8 flat chips are one machine; larger slices consist of machines with 4.
            whole = shapes is flat and number <= 8
            host = (shape[0], shape[1], 1) if whole else (2, 2, 1)
            found[f"{kind}-{number}"] = Topology(f"{kind}-{number}", CHIPS[kind], shape, host)
    return found


TOPOLOGIES = _slices()


def canonical(name: str) -> str:
    """Return a slice's name as it is in TOPOLOGIES, from any spelling."""
    return name.lower().replace("v5litepod", "v5e").replace("tpu7x", "v7x")


def chip_in(kind: str) -> Chip | None:
    """Return the chip that a device kind names, such as `v6e-8` or `TPU v6 lite`; None if it is not
    known."""
    spelled = canonical(kind).replace(" lite", "e")
    return next((chip for name, chip in CHIPS.items() if name in spelled), None)


def topology(name: str, key: str = "compile_only") -> Topology:
    """Return the slice of this name.

    Raises:
        ConfigError: an unknown name; the message lists the known ones.
    """
    found = TOPOLOGIES.get(canonical(name))
    if found is None:
        known = ", ".join(TOPOLOGIES)
        raise ConfigError(
            f"{key}: given {name!r}, expected a TPU slice: {known} (v5p and v7x names count "
            f"cores, two a chip). Set {key}=v6e-8."
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
    compiled = {name: t for name, t in TOPOLOGIES.items() if t.chip.compiles}
    fitting = [name for name, t in compiled.items() if t.chips * slices == wanted]
    other = f", or compile_only={' or '.join(fitting)}" if fitting else ""
    devices = "devices (two a chip)" if slice_.chip.per_chip == 2 else "chips"
    many = f"{slices} slices of it have" if slices > 1 else "it has"
    raise ConfigError(
        f"compile_only={slice_.name}: {many} {there} {devices}, but ici_mesh x dcn_mesh ({axes}) "
        f"takes {wanted}. {fix}{other}."
    )
