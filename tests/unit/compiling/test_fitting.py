"""The nearest change that fits: the least intrusive first, and nothing tried in vain."""

from __future__ import annotations

import itertools

from torchprime.compiling.fitting import (
    changed,
    changes,
    find_nearest,
    state_bytes,
    weights_per_chip,
)
from torchprime.compiling.sizes import step_sizes
from torchprime.compiling.theory import products_in_theory
from torchprime.config.compose import compose_config
from torchprime.config.schema import TrainConfig
from torchprime.config.topologies import GIB
from torchprime.errors import RuntimeSetupError
from torchprime.models.architecture import architecture_from_hf
from torchprime.training.setup.model_files import find_architecture

NAMED = ["--config-name", "llama-3-8b-sft-w-gsm8k", "compile_only=v6e-8"]


def sizes_for(config: TrainConfig):
    found, where = find_architecture(
        pretrained_model=config.model.pretrained_model, architecture=None, cache_dir=None
    )
    assert where == "model=llama-3-8b"
    return step_sizes(config, architecture_from_hf(found))


def test_changes_begin_with_what_leaves_the_mathematics_alone() -> None:
    config = compose_config([*NAMED, "remat=none"])
    found = list(changes(config, rows=8))
    scan = {"remat.scan_layers": True}
    assert found.pop(0) == {**scan, "remat.policy": "attention"}
    assert found.pop(0) == {**scan, "remat.policy": "full", "remat.save": ["core_out"]}
    assert found[0] == {**scan, "remat.policy": "full"}
    assert found[1] == {**scan, "remat.policy": "offload"}
    assert found[2] == {**found[0], "task.gradient_accumulation_steps": 8}
    assert found[3] == {**found[1], "task.gradient_accumulation_steps": 8}
    assert found[4] == {**found[0], "task.optimizer.name": "adafactor"}
    assert found[5] == {**found[3], "task.optimizer.name": "adafactor"}
    assert found[-4]["task.optimizer.master_weights"] is False
    assert found[-3] == {**found[0], "compile_only": "v6e-16", "ici_mesh.fsdp": 16}
    # All else changes less than training fewer weights.
    assert found[-2] == {**found[3], "adapter.rank": 16}
    assert found[-1] == {**found[-2], "adapter.base_dtype": "nf4"}
    # If all of that is already set, only the optimizer and more chips are left.
    full = compose_config([*NAMED, "task.optimizer.name=adafactor", "remat=scan_offload"])
    chips = {"compile_only": "v6e-16", "ici_mesh.fsdp": 16}
    adapter = {"adapter.rank": 16}
    assert list(changes(full, rows=1)) == [
        {"task.optimizer.master_weights": False},
        chips,
        adapter,
        {**adapter, "adapter.base_dtype": "nf4"},
    ]
    # Layers that differ cannot be one loop, and only a loop's inputs are offloaded.
    for change in changes(config, rows=8, scannable=False):
        assert change["remat.policy"] in ("attention", "full")
        assert "remat.scan_layers" not in change
    # A user's own names are given up with the policy.
    own = compose_config([*NAMED, "remat=scan_attention", "remat.save=[up]"])
    assert next(changes(own, rows=8)) == {"remat.policy": "attention", "remat.save": []}
    # Copies of the weights are given up before anything else is.
    copies = compose_config([*NAMED, "ici_mesh.data=2", "ici_mesh.fsdp=4"])
    assert next(changes(copies, rows=8)) == {"ici_mesh.data": 1, "ici_mesh.fsdp": 8}


def test_remat_is_tried_in_the_order_of_its_predicted_cost() -> None:
    """Operations of products by formula, and two products of a causal half for attention."""
    config = compose_config([*NAMED, "remat=none", "dataset.block_size=8192"])
    costs = []
    for change in itertools.takewhile(only_remat, changes(config, rows=8)):
        s = sizes_for(changed(config, change))
        again = "core_out" in s.recomputed
        attention = again * s.layers * s.rows * s.accumulation * s.heads * s.head_size
        costs.append(products_in_theory(s) + 2 * attention * s.block_size**2)
    assert len(costs) == 4 and costs == sorted(costs)
    assert costs[0] < costs[1] < costs[2] == costs[3]  # the last one also moves inputs


def only_remat(change: dict[str, object]) -> bool:
    return all(key.startswith("remat.") for key in change)


def test_an_adapters_base_is_quantized_before_more_chips() -> None:
    """Its optimizer state is small: no other optimizer is tried."""
    config = compose_config([*NAMED, "adapter=lora", "remat=scan_offload"])
    found = list(changes(config, rows=1))
    assert found[:2] == [{"adapter.base_dtype": "int8"}, {"adapter.base_dtype": "nf4"}]
    assert found[2:] == [{"compile_only": "v6e-16", "ici_mesh.fsdp": 16}]
    quantized = compose_config([*NAMED, "adapter=qlora", "remat=scan_offload"])
    assert list(changes(quantized, rows=1)) == found[2:]
    from_scratch = compose_config(["task=train", "model=llama-3-8b", "compile_only=v6e-1",
                                   "model.pretrained_model=null", "task.max_steps=1"])  # fmt: skip
    assert not any("adapter.rank" in change for change in changes(from_scratch, rows=1))


def test_state_of_an_adapter_by_hand() -> None:
    """Frozen weights are only stored; the few trained ones have masters and moments."""
    config = compose_config([*NAMED, "adapter=qlora", "mesh=single", "compile_only=v6e-1"])
    kept = weights_per_chip(config, sizes_for(config))
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    lora = 32 * 16 * (2 * 8192 + 2 * 5120 + 3 * 18432)
    assert kept["trained"] == 2 * lora and kept["optimizer"] == 12 * lora
    # Codes of half a byte, scales of a byte for 64 weights, 4 bytes for 256 scales; an offset and
    # the layer's number for each product. Embedding, head and norms are bf16.
    nf4 = layer // 2 + layer // 64 + layer // 64 // 64 + 7 * (4 + 4)
    assert kept["frozen"] == 32 * nf4 + 2 * (2 * 128256 * 4096 + 65 * 4096)
    assert state_bytes(config, sizes_for(config)) == sum(kept.values())


def test_state_by_hand() -> None:
    """Bytes a parameter: bf16 weight 2, fp32 master 4, two fp32 moments 8."""
    config = compose_config(NAMED)
    sizes = sizes_for(config)
    per_chip = (8_030_261_248 - 65 * 4096) // 8 + 65 * 4096
    assert state_bytes(config, sizes) == 14 * per_chip
    lean = changed(config, {"task.optimizer.name": "adafactor"})
    assert state_bytes(lean, sizes) == 6 * per_chip


def test_the_first_that_fits_is_named_and_hopeless_ones_are_not_compiled() -> None:
    config = compose_config(NAMED)
    compiled: list[TrainConfig] = []

    def compile_one(candidate: TrainConfig) -> dict:
        compiled.append(candidate)
        accumulates = candidate.task.gradient_accumulation_steps > 1
        return {"fits": accumulates, "memory": {"total": 7 * GIB}}

    said: list[str] = []
    found = find_nearest(config, sizes_for, 10 * GIB, compile_one, said.append)
    # AdamW's state alone is 13.1 GiB a chip: none of its changes is tried.
    assert [c.task.optimizer.name for c in compiled] == ["adafactor", "adafactor"]
    assert found["overrides"] == [
        "remat.policy=offload",
        "task.gradient_accumulation_steps=8",
        "task.optimizer.name=adafactor",
    ]
    assert found["total"] == 7 * GIB and "too large" in found["tried"][0]
    assert compose_config([*NAMED, *found["overrides"]]).task.optimizer.name == "adafactor"
    assert said[-1].endswith(" ".join(found["overrides"]))


def test_where_nothing_fits_what_was_tried_is_told() -> None:
    config = compose_config(NAMED)
    nothing = find_nearest(
        config, sizes_for, 20 * GIB, lambda c: {"fits": False}, lambda line: None
    )
    assert nothing["overrides"] is None and len(nothing["tried"]) == 10


def test_a_change_that_cannot_be_compiled_is_told_and_passed_over() -> None:
    """A chip's batch of one block cannot be spread over twice the chips; a compile may take too
    long. Neither loses what else was found."""
    config = compose_config([*NAMED, "task.global_batch_size=8"])

    def compile_one(candidate: TrainConfig) -> dict:
        if candidate.remat.policy == "offload":
            raise RuntimeSetupError("compile_time_limit: the compiler took longer than 1 minutes.")
        return {"fits": False}

    found = find_nearest(config, sizes_for, 20 * GIB, compile_one, lambda line: None)
    assert found["overrides"] is None
    assert "took longer" in found["tried"][0]
    assert any("v6e-16" in tried and "multiple of" in tried for tried in found["tried"])
