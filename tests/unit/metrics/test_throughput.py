"""The FLOPs formula against counts made another way, the chips' peaks, and the stopwatch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaForCausalLM

from torchprime.metrics.throughput import (
    ModelSizes,
    Stopwatch,
    host_memory_bytes,
    mfu,
    model_flops_per_token,
    peak_bf16_flops,
)

# One layer, one head of size 2, hidden 2, ffn 3, vocabulary 5, blocks of 4. Counted by hand:
#   weights a token is multiplied with: q, k, v, o 4 x (2 x 2) = 16; gate, up, down 3 x (2 x 3) =
#   18; head 5 x 2 = 10; together 44. Norms, two in the layer and one at the end: 3 x 2 = 6.
#   attention forward: scores 2 x 2 x 4 = 16, weighted values as much, 32; with backward 96.
HAND: dict[str, Any] = dict(vocab_size=5, hidden_size=2, windows=(None,), num_heads=1, head_size=2)
HAND_COUNT = 6 * (44 + 6) + 96


def test_a_tied_head_counts_once() -> None:
    sizes = ModelSizes(num_parameters=50, trained_parameters=50, tied_embeddings=True, **HAND)
    flops = model_flops_per_token(sizes, 4)
    assert flops == HAND_COUNT == 396


def test_an_untied_table_is_only_looked_up() -> None:
    sizes = ModelSizes(num_parameters=60, trained_parameters=60, tied_embeddings=False, **HAND)
    flops = model_flops_per_token(sizes, 4)
    assert flops == HAND_COUNT


def test_a_window_limits_what_its_layer_attends_to() -> None:
    """Two layers, one with a window of 3 and one with a window longer than the block of 4."""
    sizes = ModelSizes(
        num_parameters=88,
        trained_parameters=88,
        tied_embeddings=True,
        **{**HAND, "windows": (3, 9)},
    )
    # Scores and weighted values: 2 x 2 operations each for 3 and for 4 keys; with backward x 3.
    by_hand = 6 * 88 + 3 * (2 * 4 * 3 + 2 * 4 * 4)
    assert model_flops_per_token(sizes, 4) == by_hand


@pytest.mark.parametrize("trained", ["", "q_proj"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_formula_agrees_with_the_operations_torch_counts(tied: bool, trained: str) -> None:
    config = tiny_llama(96, intermediate_size=80, head_dim=16, tie_word_embeddings=tied)
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(trained in name)
    # Otherwise the first layer would need no gradient of its input.
    model.enable_input_require_grads()
    ids = torch.zeros(2, 24, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    sizes = ModelSizes(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        trained_parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
        vocab_size=96,
        hidden_size=32,
        tied_embeddings=tied,
        windows=(None, None),
        num_heads=4,
        head_size=16,
    )
    flops = model_flops_per_token(sizes, 24)
    # torch counts matrix products only; the formula's N also holds the norms' weights
    assert flops == pytest.approx(counter.get_total_flops() / ids.numel(), rel=0.02)


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("TPU v4", 275e12),
        ("v4-8", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("v5litepod-16", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("v6e-8", 918e12),
        ("TPU7x", 1153.5e12),
        ("TPU v7x", 1153.5e12),
        ("TPU v7", 1153.5e12),
        ("v7x-8", 1153.5e12),
        ("tpu7x-standard-4t", 1153.5e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA A100-PCIE-40GB", 312e12),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("TPU v4 lite", None),
        ("TPU v3", None),
        ("CPU", None),
        ("", None),
    ],
)
def test_peaks(kind: str, peak: float | None) -> None:
    assert peak_bf16_flops(kind) == peak


def test_mfu_is_achieved_over_peak_of_all_chips() -> None:
    # 8 x 918e12 = 7.344e15 at peak; 1000 tokens/s x 3.672e12 = half of it
    share = mfu(
        slot_tokens_per_s=1000, flops_per_token=3.672e12, device_kind="TPU v6e", num_chips=8
    )
    assert share == pytest.approx(0.5)


def test_mfu_agrees_with_a_published_figure() -> None:
    """MaxText, Llama 3 8B in blocks of 8192: 7,120 to 7,247 tokens/s per v6e chip, MFU 45.5%."""
    sizes = ModelSizes(
        num_parameters=8_030_261_248,
        trained_parameters=8_030_261_248,
        vocab_size=128_256,
        hidden_size=4096,
        tied_embeddings=False,
        windows=(None,) * 32,
        num_heads=32,
        head_size=128,
    )
    flops = model_flops_per_token(sizes, 8192)
    low, high = (
        mfu(slot_tokens_per_s=speed, flops_per_token=flops, device_kind="TPU v6e", num_chips=1)
        for speed in (7120, 7247)
    )
    assert low is not None and high is not None
    assert low < 0.455 < high


def test_mfu_of_an_unknown_chip_is_unknown() -> None:
    assert mfu(slot_tokens_per_s=1, flops_per_token=1, device_kind="CPU", num_chips=4) is None


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_lap_averages_over_its_own_steps() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    for supervised in (10, 20, 30):
        clock.now += 2.0
        watch.count(supervised_tokens=supervised, slot_tokens=120)
    lap = watch.lap()
    assert (lap.steps, lap.step_seconds) == (3, 2.0)
    assert (lap.supervised_tokens_per_s, lap.slot_tokens_per_s) == (10.0, 60.0)
    clock.now += 0.5
    watch.count(supervised_tokens=1, slot_tokens=1)
    assert (watch.lap().steps, clock.now) == (1, 106.5)


def test_paused_time_does_not_count_even_when_it_ends_in_an_error() -> None:
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 1.0
    with pytest.raises(KeyError), watch.paused():
        clock.now += 50.0
        raise KeyError
    clock.now += 1.0
    watch.count(supervised_tokens=4, slot_tokens=8)
    assert watch.lap().step_seconds == pytest.approx(2.0)


def test_a_lap_without_a_step_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="no step"):
        Stopwatch().lap()


def test_host_memory_is_this_process_s_in_bytes() -> None:
    assert 100e6 < host_memory_bytes() < 1e12  # torch alone takes more than 100 MB
