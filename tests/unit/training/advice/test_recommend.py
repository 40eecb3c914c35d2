"""Recommended values: blocks that hold the rows, batches that fit and keep their tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest

from torchprime.config.compose import compose_config
from torchprime.models.architecture import architecture_from_hf
from torchprime.training.advice.advise import with_values
from torchprime.training.advice.memory import Estimator
from torchprime.training.advice.recommend import (
    RowFacts,
    on_devices,
    recommend_batch,
    recommend_block_size,
)
from torchprime.training.advice.table import Devices, devices_named
from torchprime.training.setup.adapter import ModelForm
from torchprime.training.setup.model_files import find_architecture

CONFIG = compose_config(["--config-name", "llama-3.2-1b-sft-w-gsm8k", "eval=none",
                         "task.sample_prompts=0", "ici_mesh.fsdp=1"])  # fmt: skip


def rows(longest: int, most: int, cut: int = 0) -> RowFacts:
    return RowFacts(1000, longest, most, 10**5, cut)


@pytest.mark.parametrize(
    ("facts", "context", "size"),
    [
        (rows(103, 90), 4096, 256),  # two of 90 do not fit 128
        (rows(103, 40), 4096, 128),
        (rows(3000, 500), 4096, 4096),
        (rows(3000, 2900), 4096, 4096),  # no known size of the context holds two
        (rows(1000, 900, cut=3), 4096, 2048),  # a larger size is tried first
    ],
)
def test_a_block_holds_the_longest_example(facts: RowFacts, context: int, size: int) -> None:
    found = recommend_block_size(CONFIG, facts, context)
    assert (found.key, found.value) == ("dataset.block_size", size)


@pytest.mark.parametrize("gib", [20, 30, 60])
def test_a_batch_fits_and_keeps_the_tokens(gib: int) -> None:
    found, _ = find_architecture(
        pretrained_model=CONFIG.model.pretrained_model,
        architecture=CONFIG.model.architecture,
        cache_dir=None,
    )
    form = ModelForm(architecture_from_hf(found), None)
    config = with_values(CONFIG, {"remat.policy": "full"})
    estimator = Estimator(config, form, Devices("any", "gpu", 1, gib * 2**30, 1.0))
    wanted = 64 * config.dataset.block_size
    values = {each.key: each.value for each in recommend_batch(estimator, wanted)}
    if gib == 20:
        assert values == {}  # 16 bytes for each of 1.24 billion weights, and their gradients
        return
    batch, accumulation = values.values()
    assert batch * config.dataset.block_size >= wanted
    assert batch - 64 < accumulation  # rounded up by less than a block per micro-batch
    assert estimator.need(batch // accumulation, accumulation).total <= gib * 2**30


def test_another_number_of_devices_gets_a_mesh_of_its_own() -> None:
    there, changes = on_devices(CONFIG, devices_named("v6e-4"))
    assert there.mesh_shape()["fsdp"] == 4 and there.device_count == 4
    assert [(each.key, each.value) for each in changes] == [("ici_mesh.fsdp", 4)]
    same, none = on_devices(there, devices_named("h100-80gb:4"))
    assert same is there and none == []
    odd = replace(CONFIG, task=replace(CONFIG.task, global_batch_size=6))
    assert on_devices(odd, devices_named("v6e-4"))[0].task.global_batch_size % 4 == 0
