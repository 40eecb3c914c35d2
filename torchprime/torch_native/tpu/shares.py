"""The share of a chip along `tensor` in layers whose weights do not lie as it needs them.

A fused projection has queries, keys and values in one matrix, and kv heads may be fewer than chips:
what a chip computes is then no part of equal size. It gathers these weights whole and takes the
rows of its own heads. The program is the same on all chips, so their place is computed in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from torchprime.models.architecture import Architecture
from torchprime.torch_native.placement import own_kv_heads
from torchprime.torch_native.tpu.collectives import reduce_scatter
from torchprime.torch_native.tpu.grid import TENSOR, Grid

# Ends of the names of parameters with the rows of a layer's outputs.
BY_OUTPUT = (".weight", ".bias", ".base_layer.weight", ".base_layer.bias", ".lora_B.weight")


@dataclass(frozen=True)
class Share:
    """The rows that each chip takes, in units.

    Attributes:
        rows: of a unit.
        units: returns the numbers of a chip's units, int32, from its place along `tensor`.
    """

    rows: int
    units: Callable[[Tensor], Tensor]

    def of(self, whole: Tensor, place: Tensor) -> Tensor:
        """Return a chip's rows."""
        units = whole.unflatten(0, (-1, self.rows))
        return units.index_select(0, self.units(place)).flatten(0, 1)


def place_along_tensor(grid: Grid) -> Tensor:
    """Return the chip's number along `tensor`, int32 [1]."""
    numbers = torch.arange(grid.tensor, dtype=torch.float32)
    return (reduce_scatter(grid, numbers, 0, (TENSOR,)) / grid.tensor).int()


def kv_heads(a: Architecture, size: int) -> int:
    """Return the number of kv heads of each chip of `size` along `tensor`, which is the same for
    all: each is there once, or else once for each query."""
    counts = {len(own_kv_heads(a, size, rank)) for rank in range(size)}
    return counts.pop() if len(counts) == 1 else a.num_attention_heads // size


def shares(a: Architecture, size: int) -> Mapping[str, Share]:
    """Return the shares of layers by their names in a decoder layer."""
    queries, keys = a.num_attention_heads // size, kv_heads(a, size)
    group = a.num_attention_heads // a.num_key_value_heads
    found: dict[str, Share] = {}

    def own_keys(place: Tensor) -> Tensor:
        first = torch.arange(keys, dtype=torch.int32) * (queries // keys)  # of each head's queries
        return (place * queries + first) // group

    def of_all(place: Tensor) -> Tensor:
        own = place * queries + torch.arange(queries, dtype=torch.int32)
        key = a.num_attention_heads + own_keys(place)
        return torch.cat([own, key, a.num_key_value_heads + key])

    if a.fused_qkv:
        found["self_attn.qkv_proj"] = Share(a.head_dim, of_all)
    elif a.num_key_value_heads % size:
        found["self_attn.k_proj"] = found["self_attn.v_proj"] = Share(a.head_dim, own_keys)
    if a.fused_mlp:
        part = a.intermediate_size // size
        found["mlp.gate_up_proj"] = Share(part, lambda place: torch.cat([place, place + size]))
    return found


def by_parameter(found: Mapping[str, Share]) -> dict[str, Share]:
    """Return the shares by the names of parameters; not all of these exist in a layer."""
    return {f"{layer}{end}": share for layer, share in found.items() for end in BY_OUTPUT}
