"""The report's arithmetic against numbers worked out by hand, for Llama 3 8B on 8 chips."""

from __future__ import annotations

import pytest

from torchprime.compiling.hlo.program import Program
from torchprime.compiling.report import (
    adapter_lines,
    allocation_in_words,
    judge_traffic,
    memory_use,
    read_shortage,
    traffic,
)
from torchprime.compiling.sizes import settings, step_sizes
from torchprime.compiling.theory import Sizes
from torchprime.config.compose import compose_config
from torchprime.config.topologies import CHIPS, GIB
from torchprime.models.architecture import architecture_from_hf
from torchprime.training.setup.model_files import find_architecture

NAMED = ["--config-name", "llama-3-8b-sft-w-gsm8k"]


@pytest.fixture(scope="module")
def sizes() -> Sizes:
    return sizes_of("task.loss_chunks=8")


def sizes_of(*argv: str) -> Sizes:
    config = compose_config([*NAMED, *argv])
    found, _ = find_architecture(
        pretrained_model=config.model.pretrained_model, architecture=None, cache_dir=None
    )
    return step_sizes(config, architecture_from_hf(found))


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
    assert use["alias"] == 9 * GIB
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


QUANTIZED = {
    (14336, 8, 256): "one layer's mlp.gate_proj.base_layer.packed, whole",
    (32, 14336, 1, 256): "a chip's part of each layer's mlp.gate_proj.base_layer.packed: frozen",
    (14336, 4096): "one layer's mlp.gate_proj.weight, dequantized",
    (16, 4096): "one layer's self_attn.q_proj.lora_A.weight, whole",
}


def test_a_quantized_bases_allocations_in_words() -> None:
    sizes = sizes_of("adapter=qlora")
    assert {dims: allocation_in_words(dims, sizes) for dims in QUANTIZED} == QUANTIZED


def test_the_users_lines_name_the_adapter() -> None:
    config = compose_config([*NAMED, "adapter=qlora", "adapter.dropout=0.05"])
    kept = {"trained": GIB // 4, "frozen": 5 * GIB, "optimizer": GIB}
    report = {"settings": settings(config), "parameters": 108, "trained_parameters": 8}
    first, second = adapter_lines({**report, "weights_per_chip": kept})
    assert first.endswith("LoRA rank 16, base nf4, dropout 0.05; 8 trained parameters, 100 frozen")
    assert "5.00 GiB frozen, 0.25 GiB trained and 1.00 GiB of optimizer state" in second
    none = settings(compose_config(NAMED))
    assert adapter_lines({**report, "settings": none, "weights_per_chip": kept}) == []


def test_a_gathers_bytes_by_type() -> None:
    line = "  %g.{0} = {1}[{2}]{{0}} all-gather(%x), channel_id={0}, dimensions={{0}}"
    body = [line.format(1, "u8", 1000), line.format(2, "bf16", 300), line.format(3, "u8", 24)]
    program = Program("\n".join(["ENTRY %main (x: u8[250]) -> u8[24] {", *body, "}"]))
    numbers = {"places": 3, "runs": 3, "bytes": 1624, "types": {"u8": 1024, "bf16": 600}}
    assert traffic(program) == {"all-gather": numbers}
