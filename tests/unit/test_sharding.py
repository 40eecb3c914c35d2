"""The sharding table: matching, and every way it refuses."""

from __future__ import annotations

import pytest

from torchprime.errors import ConfigError
from torchprime.sharding import ShardingTable, shard_count

MESH = {"data": 1, "fsdp": 4, "expert": 1, "context": 1, "tensor": 2}


def _table(parameters, **activations) -> ShardingTable:
    return ShardingTable(parameters, activations, 1000)


def test_a_star_is_one_part_of_the_name() -> None:
    table = _table({"layers.*.w": ["tensor", ["data", "fsdp"]]})
    specs = table.parameter_specs({"layers.11.w": (8, 8)}, MESH)
    assert specs == {"layers.11.w": (("tensor",), ("data", "fsdp"))}
    assert shard_count(specs["layers.11.w"], MESH) == 8
    with pytest.raises(ConfigError, match=r"no pattern matches layers.1.x.w"):
        table.parameter_specs({"layers.1.x.w": (8, 8)}, MESH)


def test_every_unmatched_name_is_counted() -> None:
    names = {f"p{i}": (4,) for i in range(8)}
    with pytest.raises(ConfigError, match=r"p0, p1, p2, p3, p4 and 3 more"):
        _table({}).parameter_specs(names, MESH)


def test_a_large_parameter_left_whole_is_an_error_on_a_mesh_only() -> None:
    table = _table({"w": [None, None]})
    with pytest.raises(ConfigError, match=r"leave w \[100, 100\] whole.*max_unsharded_params=1000"):
        table.parameter_specs({"w": (100, 100)}, MESH)
    table.parameter_specs({"w": (100, 100)}, dict.fromkeys(MESH, 1))


def test_an_indivisible_dim_prints_the_equation() -> None:
    with pytest.raises(ConfigError, match=r"dim 1 of size 6 is not divisible by fsdp=4 = 4"):
        _table({"w": [None, "fsdp"]}).parameter_specs({"w": (8, 6)}, MESH)


def test_activation_patterns_that_do_nothing_are_refused() -> None:
    batch = [["data", "fsdp"], None]
    modules = ["layers.0.up", "layers.1.up"]
    _table({}, batch=batch, **{"layers.*.up": [None]}).check_activations(modules)
    with pytest.raises(ConfigError, match=r"layer.\*.up match no module"):
        _table({}, batch=batch, **{"layer.*.up": [None]}).check_activations(modules)
    with pytest.raises(ConfigError, match="no `batch`"):
        _table({}, **{"layers.*.up": [None]}).check_activations(modules)


def test_wrong_rank_and_unknown_axis() -> None:
    with pytest.raises(ConfigError, match="w has 1 dims"):
        _table({"w": [None, "fsdp"]}).parameter_specs({"w": (8,)}, MESH)
    with pytest.raises(ConfigError, match="'tensr' is no mesh axis; the axes are data, fsdp"):
        _table({"w": ["tensr"]}).parameter_specs({"w": (8,)}, MESH)
    with pytest.raises(ConfigError, match=r"sharding.activations.batch: 'fdsp'"):
        _table({"w": [None]}, batch=[["data", "fdsp"], None]).parameter_specs({"w": (8,)}, MESH)
