"""The bytes that a forward pass keeps, against those that autograd holds in a real one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_families import FAMILIES, SIZES

from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.training.setup.activations import Shape, kept_bytes, live_bytes, storage_of

ROWS, SIZE = 2, 48  # longer than the windows


def held_by_autograd(model: CausalLM) -> int:
    """Return the bytes of all tensors that the graph of a forward pass holds, without weights."""
    held: dict[Any, int] = {}
    known = {storage_of(each) for each in model.parameters()}
    ids = torch.arange(ROWS * SIZE).view(ROWS, SIZE).to(torch.int32)
    known.add(storage_of(ids))

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_of(tensor)
        if storage not in known:
            held[storage] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = model(ids, ids % SIZE, torch.ones_like(ids))
    held[storage_of(hidden)] = hidden.numel() * hidden.element_size()
    return sum(held.values())


@pytest.mark.parametrize("family", ["llama_tied", "phi3_window", "glm4", "gemma3", "olmo2"])
def test_the_bytes_kept_are_those_that_autograd_holds(family: str) -> None:
    """Of norms before and after, fused projections, windows and norms of queries and keys."""
    name, switches = FAMILIES[family]
    config = getattr(transformers, f"{name}ForCausalLM").config_class(**{**SIZES, **switches})
    a = architecture_from_hf(config.to_dict())

    def build(layers: int) -> CausalLM:
        return CausalLM(a.with_layers(layers))

    counted = [
        kept_bytes(build, layers, Shape(ROWS, SIZE, 1), core="reference", names=None)
        for layers in (1, 2)
    ]
    assert counted == [pytest.approx(held_by_autograd(build(n)), rel=0.01) for n in (1, 2)]
    whole = live_bytes(build, 2, Shape(ROWS, SIZE, 1), core="reference", names=None)
    assert whole.kept == counted[1] < whole.peak
