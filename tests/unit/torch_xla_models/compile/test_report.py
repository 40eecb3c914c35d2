"""The report's arithmetic against numbers worked out by hand, for Llama 3 8B on 8 chips."""

from __future__ import annotations

import dataclasses

import pytest

from torchprime.config.compose import compose_config
from torchprime.config.topologies import CHIPS, GIB
from torchprime.models.architecture import architecture_from_hf
from torchprime.torch_xla_models.compile.command import step_sizes
from torchprime.torch_xla_models.compile.report import (
    Sizes,
    allocation_in_words,
    judge_traffic,
    kernel_flops,
    memory_use,
    products_in_theory,
    read_shortage,
    roofline,
    traffic_in_theory,
)
from torchprime.training.setup.model_files import find_architecture

NAMED = ["--config-name", "llama-3-8b-sft-w-gsm8k"]


def sizes_of(*argv: str) -> Sizes:
    config = compose_config([*NAMED, *argv])
    found, _ = find_architecture(
        pretrained_model=config.model.pretrained_model, architecture=None, cache_dir=None
    )
    return step_sizes(config, architecture_from_hf(found))


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return sizes_of()


def test_sizes_of_the_named_run(sizes: Sizes) -> None:
    assert sizes.tokens == 8 * 1024  # 64 blocks on 8 chips
    assert sizes.pieces["lm_head.weight"] == 8 and sizes.pieces["model.norm.weight"] == 1


def test_products_of_the_named_run(sizes: Sizes) -> None:
    """4.52e14 by hand, and what the compiler's program had: 4.5243e14."""
    layer = 2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336
    head = 128256 * 4096
    by_hand = 8192 * (6 * (32 * layer + head) + 2 * 32 * (layer - 4096 * 14336))
    assert products_in_theory(sizes) == by_hand == pytest.approx(4.5243e14, rel=1e-4)
    kept = dataclasses.replace(sizes, full_remat=False)
    assert products_in_theory(kept) == 8192 * 6 * (32 * layer + head)


def test_traffic_of_fsdp(sizes: Sizes) -> None:
    theory = traffic_in_theory(sizes)
    matrices = 2 * (8_030_261_248 - 65 * 4096)  # bf16, without the norms
    assert theory == {"all-gather": 2 * matrices, "reduce-scatter": matrices, "all-reduce": 0}
    four = traffic_in_theory(dataclasses.replace(sizes, accumulation=4, rows=2))
    assert four["all-gather"] == 8 * matrices and four["reduce-scatter"] == 4 * matrices


def test_traffic_of_tensor_parallelism() -> None:
    sizes = sizes_of("ici_mesh.fsdp=2", "ici_mesh.tensor=4")
    theory = traffic_in_theory(sizes)
    assert theory["all-gather"] == 2 * 2 * (8_030_261_248 - 65 * 4096) // 4
    assert theory["all-reduce"] == 5 * 32 * (32 * 1024) * 4096 * 2


def test_only_what_is_too_much_is_said() -> None:
    theory = {"all-gather": 100 * GIB, "reduce-scatter": 50 * GIB, "all-reduce": 0}
    fine = {"all-gather": {"bytes": 120 * GIB}, "reduce-scatter": {"bytes": 60 * GIB}}
    assert judge_traffic(fine, theory) == []
    twice = {"all-gather": {"bytes": 126 * GIB}, "all-reduce": {"bytes": 50 * GIB}}
    gather, reduce = judge_traffic(twice, theory)
    assert "all-gather: 126.00 GiB a step, 1.26 times the 100.00 GiB" in gather
    assert "all-reduce: 50.00 GiB a step, none that the sharding needs" in reduce


def test_memory_counts_outputs_that_are_written_over_once() -> None:
    stats = {"argument": 10 * GIB, "output": 10 * GIB, "alias": 9 * GIB, "temp": 4 * GIB}
    use = memory_use({**stats, "generated_code": 0}, CHIPS["v5e"])
    assert use["total"] == 15 * GIB and use["fits"]
    more = memory_use({**stats, "generated_code": GIB}, CHIPS["v5e"])
    assert not more["fits"] and more["limit"] == 15.75 * GIB


SHORTAGE = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 24.46G of 15.75G hbm. Exceeded hbm capacity by 8.71G.

Total hbm usage >= 24.71G:
    reserved        258.00M
    arguments        13.09G

  Largest program allocations in hbm:

  1. Size: 1002.00M
     Operator: op_name="dot.1079"
     Shape: bf16[4096,128256]{1,0:T(8,128)(2,1)}
     Unpadded size: 1002.00M
     XLA label: fusion.350.remat2 = fusion(bitcast.685, bitcast.107), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 501.00M
     Shape: f32[8,128,128256]{2,1,0:T(8,128)}
     ==========================

  3. Size: 2.00G
     Shape: bf16[32,8,1024,4096]{2,1,0:T(8,128)(2,1)}
     ==========================
"""  # noqa: E501


def test_a_shortage_in_words(sizes: Sizes) -> None:
    found = read_shortage(SHORTAGE, sizes)
    assert found is not None
    assert found["used"] == int(24.46 * GIB) and found["limit"] == int(15.75 * GIB)
    words = [each["what"] for each in found["largest"]]
    assert [each["bytes"] for each in found["largest"]] == [1002 * 2**20, 501 * 2**20, 2 * GIB]
    assert words[0].startswith("the whole embedding or output weight")
    assert words[1].startswith("logits of one loss chunk")
    assert words[2].startswith("hidden states of all layers, kept")
    assert read_shortage("INTERNAL: Mosaic failed to compile TPU kernel", sizes) is None


@pytest.mark.parametrize(
    ("dims", "words"),
    [
        ((8, 1024, 14336), "MLP activations of one layer"),
        ((32, 14336, 512), "a chip's part of each layer's mlp.gate_proj.weight"),
        ((14336, 4096), "one layer's mlp.gate_proj.weight, whole"),
        ((8, 32, 1024, 128), "attention heads of one layer"),  # as many as hidden states
        ((8192, 4096), "hidden states of one layer"),  # merged
        ((8, 128, 4096), "hidden states of one loss chunk"),
        ((7, 11), "a temporary of the step"),
    ],
)
def test_allocations_in_words(dims, words: str, sizes: Sizes) -> None:
    assert allocation_in_words(dims, sizes).startswith(words)


def test_kernels_count_the_causal_half(sizes: Sizes) -> None:
    kernels = {"splash_mha_fwd_segmented_residuals_block": 1, "splash_mha_dkv_segmented_block": 1}
    # Forward q k' and p v over half of 1024 x 1024, for 8 rows and 32 heads of 128; backward five.
    half = 2 * 8 * 32 * 128 * 1024 * 1024 // 2
    assert kernel_flops(kernels, sizes) == 2 * half + 5 * half


def test_roofline() -> None:
    moved = {"all-gather": {"bytes": int(400e9)}, "all-reduce": {"bytes": int(200e9)}}
    times = roofline(int(918e12), int(3200e9), moved, CHIPS["v6e"])
    assert times == {
        "compute": 1.0, "hbm": 2.0, "ici": 2.0, "overlapped": 2.0, "in_turn": 5.0
    }  # fmt: skip
