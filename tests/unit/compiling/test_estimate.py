"""The report's estimate and its words, for a program of one product and one kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest

from torchprime.compiling.estimate import estimate
from torchprime.compiling.hlo.program import Program
from torchprime.compiling.report import work_lines
from torchprime.compiling.theory import Sizes
from torchprime.config.sections.remat import NAMES
from torchprime.config.topologies import CHIPS

# ruff: noqa: E501
PROGRAM = """ENTRY %main (x: bf16[8192,4096], w: bf16[4096,4096]) -> bf16[8192,4096] {
  %x = bf16[8192,4096]{1,0} parameter(0)
  %w = bf16[4096,4096]{1,0} parameter(1)
  %dot = bf16[8192,4096]{1,0:S(1)} dot(%x, %w), lhs_contracting_dims={1}, rhs_contracting_dims={0}, metadata={op_name="q_proj"}, backend_config={"estimated_cycles":"700000"}
  ROOT %splash_mha_fwd_segmented.1 = bf16[8192,4096]{1,0:S(1)} custom-call(%dot), custom_call_target="tpu_custom_call"
}
"""
PRODUCT = 2 * 8192 * 4096 * 4096
ATTENTION = 2 * 8192**2 * 4096  # two products of 32 heads, the causal half
BYTES = 2 * (8192 * 4096 + 4096 * 4096)


@pytest.fixture(scope="module")
def found() -> dict:
    sizes = Sizes(
        shapes={}, weights={}, fsdp=8, tensor=1, data=1, weight_bytes=2, windows=(None,), hidden=4096,
        ffn=14336, vocab=128256, heads=32, kv_heads=8, head_size=128, tied=False, block_size=8192,
        rows=1, accumulation=1, loss_chunk=64, recomputed=NAMES[1:],
    )  # fmt: skip
    return estimate(
        Program(PROGRAM), replace(CHIPS["v6e"], flops=1e15, hbm_bytes_per_s=1e12), sizes
    )


def test_a_step(found) -> None:
    compute = (PRODUCT + ATTENTION) / 1e15
    assert found["alone_s"] == pytest.approx({"compute": compute, "hbm": BYTES / 1e12, "ici": 0})
    assert found["hbm_bytes"] == BYTES
    assert found["step_s"] == pytest.approx(compute)  # the product takes longer than its bytes
    assert found["bound_by_s"] == pytest.approx({"compute": compute, "hbm": 0, "ici": 0, "wait": 0})
    assert found["slot_tokens_per_s_per_chip"] == pytest.approx(8192 / compute)
    cycles = {"cycles": 700000, "clock_hz": 1.75e9, "seconds": 700000 / 1.75e9}
    assert found["compiler"] == cycles


def test_its_longest_operations(found) -> None:
    kernel, product = found["longest"]
    assert kernel["name"] == "splash_mha_fwd_segmented.1" and kernel["compiler_s"] is None
    assert product["purpose"] == "q_proj" and product["compute_s"] == PRODUCT / 1e15
    assert product["compiler_s"] == pytest.approx(0.4e-3)


def test_its_words(found) -> None:
    flops = {"products": PRODUCT, "ratio": 1.0, "kernels_estimate": ATTENTION}
    report = {"flops": flops, "estimate": found, "kernels": {}, "loops": [], "fusions": 0}
    said = "\n".join(work_lines(report))
    assert "0.001 s a step by published peaks" in said and "not a measurement" in said
    assert "each alone: compute 0.001 s, memory 0.000 (0 GB), interconnect 0.000" in said
    assert "its own cycles: 0.000 s at 1.75 GHz, without kernels and collectives" in said
