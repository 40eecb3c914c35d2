"""Attention kernels of GPUs: what they are told of segments, and which one is chosen.

flash-attn itself runs on CUDA only. Here a function of its signature stands for it, which knows
nothing but the offsets it is given.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from torchprime.errors import ConfigError
from torchprime.models.attention import ReferenceAttention
from torchprime.torch_native import attention
from torchprime.torch_native.attention import (
    Flash,
    FlashAttention,
    FlexAttention,
    choose_kernel,
    find_flash,
    flex_trains_on_cpu,
    kernel_for_softcap,
)

B, H, K, S, h = 4, 4, 2, 48, 8
# The ids of neighbouring blocks are equal where they meet; segments of one token; a block without
# any padding, one of padding only.
SEGMENTS = torch.tensor(
    [
        [1] * 20 + [2] * 20 + [0] * 8,
        [1] * 48,
        [1] * 1 + [2] * 1 + [3] * 46,
        [0] * 48,
    ],
    dtype=torch.int32,
)
WINDOWS = [None, 1, 5, 100]
NO_FLEX = "this torch has no backward for FlexAttention on the CPU"


def attend_alone(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, softcap: float | None = None
) -> Tensor:
    """Causal attention of one sequence, written out: q [H, n, h]; k, v [K, n, h]."""
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], dim=0) for x in (k, v))
    n = q.shape[1]
    back = torch.arange(n)[:, None] - torch.arange(n)[None, :]
    seen = (back >= 0) & (back < (n + 1 if window is None else window))
    scores = (q @ k.transpose(1, 2)) / q.shape[2] ** 0.5
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v


def segment_by_segment(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None, softcap: float | None
) -> Tensor:
    """Each segment by itself, found by its id in its block."""
    out = torch.zeros_like(q)
    for block, ids in enumerate(SEGMENTS):
        for segment in ids.unique():
            here = ids == segment
            alone = (x[block][:, here] for x in (q, k, v))
            out[block, :, here] = attend_alone(*alone, window=window, softcap=softcap)
    return out


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
) -> Tensor:
    """The stand-in: q [tokens, H, h]; k, v [tokens, K, h] -> [tokens, H, h]."""
    assert causal and softmax_scale == q.shape[2] ** -0.5
    assert cu_seqlens_q.dtype == torch.int32 and torch.equal(cu_seqlens_q, cu_seqlens_k)
    assert window_size == (-1, -1) or window_size[1] == 0
    lengths = cu_seqlens_q.diff()
    assert cu_seqlens_q[0] == 0 and cu_seqlens_q[-1] == len(q) and (lengths > 0).all()
    assert lengths.max() <= max_seqlen_q == max_seqlen_k
    window = None if window_size[0] < 0 else window_size[0] + 1
    pieces = [
        attend_alone(*(x[start:stop].transpose(0, 1) for x in (q, k, v)), window=window).transpose(
            0, 1
        )
        for start, stop in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], strict=True)
    ]
    return torch.cat(pieces)


def results(core: Any, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Outputs and gradients of a core, or of a function of q, k and v."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, n, S, h, dtype=torch.float64) for n in (H, K, K))
    weight = torch.randn(B, H, S, h, dtype=torch.float64).to(dtype)
    inputs = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    out = core(*inputs, core.prepare(SEGMENTS)) if hasattr(core, "prepare") else core(*inputs)
    gradients = torch.autograd.grad((out * weight).sum(), inputs)
    return [x.double() for x in (out, *gradients)]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize(
    ("kernel", "softcap"),
    [("flash", None), ("flex", None), ("flex", 0.7), ("reference", None), ("reference", 0.7)],
)
def test_kernels_are_attention_segment_by_segment(
    kernel: str, softcap: float | None, window: int | None
) -> None:
    cores = {
        "flash": lambda: FlashAttention(h, window, flash_attn_varlen_func),
        "flex": lambda: FlexAttention(h, window, softcap, compiled=False),
        "reference": lambda: ReferenceAttention(h, window, softcap),
    }
    if kernel == "flex" and not flex_trains_on_cpu():
        pytest.skip(NO_FLEX)
    expected = results(partial(segment_by_segment, window=window, softcap=softcap), torch.float64)
    for ours, theirs in zip(results(cores[kernel]()), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize(("kernel", "softcap"), [("flash", None), ("flex", None), ("flex", 0.7)])
def test_the_kernels_themselves(kernel: str, softcap: float | None, window: int | None) -> None:
    """On CUDA in bf16, with sizes that they take, against double precision."""
    flash = find_flash()
    if kernel == "flash" and flash.attend is None:
        pytest.skip(flash.told)
    made: dict[str, Callable[[], Any]] = {
        "flash": lambda: FlashAttention(64, window, flash.attend),  # type: ignore[arg-type]
        "flex": lambda: FlexAttention(64, window, softcap, compiled=True),
    }
    torch.manual_seed(0)
    segments = torch.tensor([[1] * 100 + [2] * 156, [1] * 256], dtype=torch.int32, device="cuda")
    q, k, v = (torch.randn(2, n, 256, 64, device="cuda") for n in (8, 2, 2))
    out = []
    reference = ReferenceAttention(64, window, softcap)
    for core, dtype in ((made[kernel](), torch.bfloat16), (reference, None)):
        given = [x.to(dtype or torch.float64).requires_grad_() for x in (q, k, v)]
        mixed = core(*given, core.prepare(segments))
        out.append([mixed, *torch.autograd.grad(mixed.pow(2).sum(), given)])
    for ours, theirs in zip(*out, strict=True):
        assert (ours - theirs).abs().max() <= 2e-2 * theirs.abs().max()


def test_offsets_cut_where_ids_change_and_where_blocks_end() -> None:
    offsets = FlashAttention(h, None, flash_attn_varlen_func).prepare(SEGMENTS)
    assert offsets.tolist() == [0, 20, 40, 48, 96, 97, 98, 144, 192]
    assert offsets.dtype == torch.int32


def graphs() -> int:
    counters: Any = torch._dynamo.utils.counters
    return int(counters["stats"]["unique_graphs"])


def blocks_of(*lengths: int) -> Tensor:
    """Two blocks with segments of these lengths."""
    ids = [number for number, length in enumerate(lengths, start=1) for _ in range(length)]
    return torch.tensor([ids, ids], dtype=torch.int32)


def test_another_number_of_segments_compiles_nothing_anew() -> None:
    """torch.compile sets the same guards on the CPU without its code generator."""
    torch._dynamo.reset()
    flash, flex = (
        FlashAttention(h, None, flash_attn_varlen_func),
        FlexAttention(h, 9, compiled=False),
    )
    flex.make_mask = torch.compile(flex.make_mask, backend="eager")

    @torch.compile(backend="eager")
    def reads_offsets(offsets: Tensor) -> Tensor:
        return offsets.diff() * 2

    counts = []
    for lengths in [(16, 16), (32,), (8, 8, 8, 8), (1, 31), (10, 10, 12), (31, 1)]:
        before = graphs()
        reads_offsets(flash.prepare(blocks_of(*lengths)))
        flex.prepare(blocks_of(*lengths))
        counts.append(graphs() - before)
    assert counts == [2, 0, 0, 0, 0, 0]


# Choosing -----------------------------------------------------------------------------------------

FOUND, MISSING = Flash(flash_attn_varlen_func, "flash-attn 2.8.3"), Flash(None, "not installed")


def choose(wanted: str = "auto", device: str = "cuda", **others: Any) -> tuple[str, str]:
    given: dict[str, Any] = {"full_precision": False, "capability": (9, 0), "flash": FOUND}
    return choose_kernel(wanted, device, **(given | others))


@pytest.mark.parametrize(
    ("facts", "kernel", "why"),
    [
        ({}, "flash", "auto on CUDA: flash-attn 2.8.3"),
        ({"flash": MISSING}, "flex", "auto on CUDA: not installed"),
        ({"full_precision": True}, "flex", "this run is in float32"),
        ({"capability": (7, 5)}, "flex", "needs compute capability 8.0, and this GPU has 7.5"),
        ({"device": "cpu"}, "reference", "auto on cpu"),
        ({"wanted": "reference"}, "reference", "as configured"),
        ({"wanted": "flex"}, "flex", "as configured"),
    ],
)
def test_the_kernel_and_why(facts: dict[str, Any], kernel: str, why: str) -> None:
    chosen, told = choose(**facts)
    assert chosen == kernel and why in told


def test_flex_on_a_cpu_that_cannot_train_with_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention, "flex_trains_on_cpu", lambda: False)
    with pytest.raises(ConfigError, match="flex: torch .* has no backward for it on the CPU"):
        choose("flex", "cpu")
    assert choose("flex", "cuda") == ("flex", "as configured")


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"wanted": "splash"}, "splash runs on TPUs only.*use auto, flash, flex or reference"),
        ({"wanted": "flash", "flash": MISSING}, "flash: not installed.*pip install flash-attn"),
        ({"wanted": "flash", "device": "cpu"}, "CUDA only, and this run is on cpu.*Use auto"),
        ({"wanted": "flash", "full_precision": True}, "computes in bfloat16"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused(facts: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        choose(**facts)


def test_a_soft_cap_is_not_given_to_flash_attn() -> None:
    flash, configured = choose(), choose("flash")
    assert kernel_for_softcap("auto", flash, None) == flash
    kernel, why = kernel_for_softcap("auto", flash, 50.0)
    assert kernel == "flex" and "attn_logit_softcapping" in why
    for other in ("flex", "reference"):
        assert kernel_for_softcap(other, choose(other), 50.0) == (other, "as configured")
    with pytest.raises(ConfigError, match="attention_kernel=flash: .*softcapping.*Use auto, flex"):
        kernel_for_softcap("flash", configured, 50.0)


def test_flash_attn_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "installed_version", lambda name: None)
    assert find_flash() == Flash(None, "flash-attn is not installed")
    monkeypatch.setattr(attention, "installed_version", lambda name: "2.8.3")
    stand_in: Any = ModuleType("flash_attn")
    monkeypatch.setitem(sys.modules, "flash_attn", stand_in)
    assert find_flash().attend is None and "2.8.3 cannot be loaded" in find_flash().told
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func
    assert find_flash() == FOUND
