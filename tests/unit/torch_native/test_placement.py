"""Heads shared out along the tensor axis: by naive counting, and refused where they cannot be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from torchprime.config.compose import compose_config
from torchprime.errors import ConfigError
from torchprime.models.architecture import Architecture
from torchprime.models.decoder import DecoderLayer
from torchprime.models.layer_kinds import LayerKind
from torchprime.models.rope_config import Rope
from torchprime.sharding import ShardingTable
from torchprime.torch_native.placement import KV_PROJECTIONS, own_kv_heads, tensor_styles

SMALL = Architecture("llama", 64, 32, 64, 2, 4, 2, 8, 1e-6, (Rope(),), (LayerKind(),) * 2)


@pytest.mark.parametrize("kv_heads", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 6, 12])
def test_every_query_finds_its_kv_head(kv_heads: int, size: int) -> None:
    """An attention core takes its kv heads in order, each for as many queries."""
    a = replace(SMALL, num_attention_heads=12, num_key_value_heads=kv_heads)
    seen = []
    for rank in range(size):
        mine = own_kv_heads(a, size, rank)
        queries = 12 // size
        assert queries % len(mine) == 0
        seen += [mine[query // (queries // len(mine))] for query in range(queries)]
    assert seen == [query // (12 // kv_heads) for query in range(12)]


def styles(a: Architecture, size: int) -> dict[str, object]:
    sharding = compose_config(["model.pretrained_model=x", "task.max_steps=1"]).sharding
    table = ShardingTable(sharding.parameters, sharding.activations)
    with torch.device("meta"):
        return dict(tensor_styles(DecoderLayer(a, LayerKind()), a, table, size))


def test_projections_to_kv_heads_stay_whole_where_they_cannot_be_shared_out() -> None:
    assert len(styles(SMALL, 2)) == 7
    whole = set(styles(SMALL, 2)) - set(styles(replace(SMALL, num_key_value_heads=1), 2))
    assert whole == set(KV_PROJECTIONS)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 1}, 2, "tensor=2 .* 3 attention heads"),
        (
            {"qk_norm": True, "qk_norm_over_heads": True},
            4,
            "tensor: given 4.* 2 kv heads.*all heads",
        ),
        ({"intermediate_size": 63}, 2, "tensor=2 does not divide dim 0 of mlp.gate_proj"),
    ],
)
def test_what_cannot_be_cut_is_refused(changes: dict[str, Any], size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        styles(replace(SMALL, **changes), size)
