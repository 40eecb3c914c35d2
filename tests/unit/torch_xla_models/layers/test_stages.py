"""Sums over a square of chips in two stages: values, groups of chips, and the meshes that have
them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from dumped import run_and_dump

from torchprime.sharding import Spec
from torchprime.torch_xla_models.layers import stages

# On a square of 2 x 2 virtual devices, against products in float64.
VALUES = """
import numpy as np
import torch
import torch_xla
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torchprime.torch_xla_models.layers.stages import Stages
from torchprime.torch_xla_models.mesh import annotate, execute, to_device

xr.use_spmd()
chips = xs.Mesh(np.arange(4), (4,), ("fsdp",))
plane = xs.Mesh(np.arange(4), (2, 2), ("column", "row"))
torch.manual_seed(0)
x, grad = torch.randn(24, 16, dtype=torch.float64), torch.randn(24, 8, dtype=torch.float64)
sent = [to_device(t.float(), chips, (("fsdp",), ())) for t in (x, grad)]
for cut, whole in enumerate([("fsdp", None), (None, "fsdp")]):
    found = Stages(plane, 2, cut).gradient(*sent)
    annotate(found, chips, whole)
    execute([found])
    torch.testing.assert_close(found.cpu().double(), grad.t() @ x, atol=1e-5, rtol=1e-5)
    print(cut)
"""


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("programs")
    output, texts = run_and_dump(VALUES, folder, 4)
    assert output.split() == ["0", "1"]
    return [text for text in texts if "all-reduce" in text or "reduce-scatter" in text]


def test_the_values_are_those_of_one_sum(programs: list[str]) -> None:
    """The process compares them."""
    assert len(programs) == 2


def test_a_column_is_summed_first_and_then_a_row_of_what_is_kept(programs: list[str]) -> None:
    for program in programs:
        found = re.findall(
            r"= f32\[([\d,]+)\]\S* (?:all-reduce|reduce-scatter)\(.*replica_groups=(\S+?\}\}),",
            program,
        )
        sizes = [np.prod([int(size) for size in shape.split(",")]) for shape, _ in found]
        assert [groups for _, groups in found] == ["{{0,2},{1,3}}", "{{0,1},{2,3}}"], program
        assert sizes == [8 * 16, 8 * 16 // 2]


SPEC: Spec = (("tensor",), ("fsdp",))


def square(side: int) -> list[list[int]]:
    return [[x, y, 0] for y in range(side) for x in range(side)]


def mesh(**sizes: int) -> Any:
    """A mesh that this process has too few devices for."""
    axes = dict.fromkeys(("data", "fsdp", "expert", "context", "tensor"), 1) | sizes
    ids = list(range(math.prod(axes.values())))
    return SimpleNamespace(device_ids=ids, mesh_shape=tuple(axes.values()), axis_names=tuple(axes))


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[list[int]]], None]:
    def plane(ids: list[int], shape: tuple[int, ...], names: tuple[str, ...]) -> Any:
        return SimpleNamespace(device_ids=ids, mesh_shape=shape, axis_names=names)

    monkeypatch.setattr(stages.xs, "Mesh", plane)
    return lambda places: monkeypatch.setattr(stages, "device_places", lambda: places)


@pytest.mark.parametrize(("spec", "cut"), [(SPEC, 1), ((("fsdp",), ("tensor",)), 0)])
def test_fsdp_over_a_square_is_summed_in_stages(
    spec: Spec, cut: int, places: Callable[[list[list[int]]], None]
) -> None:
    places(square(4))
    found = stages.stages_for(mesh(fsdp=16), spec, (4096, 1024))
    assert found is not None and (found.side, found.cut) == (4, cut)
    assert found.mesh.device_ids == list(range(16)) and found.mesh.mesh_shape == (4, 4)


WHOLE = (4096, 1024)
ELSEWHERE = {
    "virtual devices": (mesh(fsdp=16), [], SPEC, WHOLE),
    "a line of two squares": (mesh(fsdp=8), square(4)[:8], SPEC, WHOLE),
    "a small square": (mesh(fsdp=4), square(2), SPEC, WHOLE),
    "two groups": (mesh(data=2, fsdp=8), square(4), SPEC, WHOLE),
    "other places": (mesh(fsdp=16), [[y, x, 0] for x, y, _ in square(4)], SPEC, WHOLE),
    "a small weight": (mesh(fsdp=16), square(4), SPEC, (64, 1024)),
    "a whole weight": (mesh(fsdp=16), square(4), ((), ("tensor",)), WHOLE),
    "no linear layer": (mesh(fsdp=16), square(4), None, WHOLE),
}


@pytest.mark.parametrize("where", ELSEWHERE)
def test_elsewhere_one_sum_is_as_good(
    where: str, places: Callable[[list[list[int]]], None]
) -> None:
    given, chips, spec, shape = ELSEWHERE[where]
    places(chips)
    assert stages.stages_for(given, spec, shape) is None
