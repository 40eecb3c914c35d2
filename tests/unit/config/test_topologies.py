"""Slices by the cloud's names, and meshes that do not fit them."""

from __future__ import annotations

import pytest

from torchprime.config.compose import compose_config
from torchprime.config.topologies import CHIPS, GIB, TOPOLOGIES, chip_in, topology
from torchprime.errors import ConfigError

GIVEN = ["model.pretrained_model=x", "task.max_steps=1"]


@pytest.mark.parametrize(
    ("name", "chips", "libtpu_name"),
    [
        ("v5e-4", 4, "v5e:2x2"),
        ("v5e-8", 8, "v5e:2x4"),
        ("v5e-16", 16, "v5e:4x4"),
        ("v5litepod-16", 16, "v5e:4x4"),
        ("v6e-1", 1, "v6e:1x1"),
        ("v6e-4", 4, "v6e:2x2"),
        ("v6e-8", 8, "v6e:2x4"),
        ("v6e-16", 16, "v6e:4x4"),
        ("v6e-256", 256, "v6e:16x16"),
        ("v5p-8", 4, "v5p:2x2x1"),  # cores, two a chip
        ("v5p-16", 8, "v5p:2x2x2"),
        ("V6E-8", 8, "v6e:2x4"),
        ("v7x-8", 8, "tpu7x:2x2x1"),  # cores, each a device
        ("tpu7x-16", 16, "tpu7x:2x2x2"),
    ],
)
def test_names_of_the_cloud(name: str, chips: int, libtpu_name: str) -> None:
    found = topology(name)
    assert (found.chips, found.libtpu_name) == (chips, libtpu_name)


def test_hosts_divide_every_slice() -> None:
    for each in TOPOLOGIES.values():
        shape = (*each.shape, 1)[:3]
        assert all(side % host == 0 for side, host in zip(shape, each.host_shape, strict=True))


def test_a_v7x_device_is_half_a_chip() -> None:
    """Published of a chip: 2,307 TFLOP/s, 7,380 GB/s, 1,200 GB/s of links in both directions."""
    chip = topology("v7x-8").chip
    assert chip.per_chip == 2 and chip.hbm_bytes == int(94.74 * GIB)
    speeds = (chip.flops, chip.hbm_bytes_per_s, chip.ici_bytes_per_s)
    assert [2 * each for each in speeds] == [2307e12, 7380e9, 1200e9 / 2]


# Operations in a cycle of one large product, by the cycles that libtpu itself estimates.
REACHED = {"v5e": 128_290, "v6e": 479_864, "v5p": 236_340, "v7x": 455_835}


@pytest.mark.parametrize("name", REACHED)
def test_clocks_agree_with_the_compilers_cycles(name: str) -> None:
    chip = CHIPS[name]
    assert 0.85 < REACHED[name] / (chip.flops / chip.clock_hz) < 1.0


@pytest.mark.parametrize(
    ("kind", "chip"),
    [("v6e-8", "v6e"), ("v5litepod-16", "v5e"), ("TPU v6 lite", "v6e"), ("TPU v5p", "v5p")],
)
def test_a_device_kind_names_its_chip(kind: str, chip: str) -> None:
    assert chip_in(kind) == CHIPS[chip]
    assert chip_in("CPU") is None


def test_an_unknown_slice_lists_those_known() -> None:
    with pytest.raises(ConfigError, match="compile_only: given 'v9x-8'.*v6e-8.*v5p-16") as raised:
        compose_config([*GIVEN, "compile_only=v9x-8"])
    assert all(name in str(raised.value) for name in TOPOLOGIES)


def test_a_mesh_that_does_not_take_the_chips() -> None:
    message = r"it has 8 chips, but ici_mesh x dcn_mesh \(fsdp=4\) takes 4. Set ici_mesh.fsdp=8"
    with pytest.raises(ConfigError, match=message) as raised:
        compose_config([*GIVEN, "mesh=fsdp4", "compile_only=v6e-8"])
    assert "compile_only=v5e-4 or v6e-4 or v5p-8" in str(raised.value)
    with pytest.raises(ConfigError, match=r"v7x-16: it has 16 devices \(two a chip\)") as raised:
        compose_config([*GIVEN, "mesh=fsdp8", "compile_only=v7x-16"])
    assert "compile_only=v5e-8 or v6e-8 or v5p-16." in str(raised.value)  # v7x-8 has 8 too
    with pytest.raises(ConfigError, match=r"fsdp=2 x tensor=2.* takes 4. Set ici_mesh.fsdp=8"):
        compose_config([*GIVEN, "mesh=fsdp2_tensor2", "compile_only=v6e-16"])


def test_several_slices_have_their_chips_together() -> None:
    config = compose_config([*GIVEN, "mesh=two_slices_fsdp8", "compile_only=v6e-8"])
    assert config.device_count == 16
    with pytest.raises(ConfigError, match="2 slices of it have 32 chips"):
        compose_config([*GIVEN, "mesh=two_slices_fsdp8", "compile_only=v6e-16"])
