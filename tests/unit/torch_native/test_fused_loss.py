"""The fused cross-entropy is ours by another kernel: sums, weights and shares of every token.

Liger runs on CUDA only. A function of its signature stands for it here, and the test marked `gpu`
asks the real one the same.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from torchprime.errors import ConfigError
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import LossSums, chunked_cross_entropy
from torchprime.losses.token_loss import TokenLoss
from torchprime.torch_native import fused_loss
from torchprime.torch_native.fused_loss import (
    NEEDED,
    Liger,
    LossRequest,
    choose_loss,
    find_liger,
    fused_cross_entropy,
    loss_for_softcap,
    on_supervised_tokens,
)

sys.path.insert(0, str(Path(__file__).parent))

import liger_stand_in  # noqa: E402

B, S, D, V = 3, 16, 8, 40
STAND_IN = partial(fused_cross_entropy, liger_forward=liger_stand_in.forward)


def example(dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    """hidden, output weight, targets, weights: some without target, some without weight."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(B, S, D), torch.randn(V, D) * 0.5
    targets = torch.randint(0, V, (B, S), dtype=torch.int32)
    weights = torch.randint(0, 4, (B, S)) * 0.5
    targets[0, 3:7] = -100  # with weights above 0, which then count for nothing
    targets[2] = -100
    assert (weights == 0).any() and (weights[0, 3:7] > 0).any()
    wide = [x.to(device, dtype).requires_grad_() for x in (hidden, weight)]
    return [*wide, targets.to(device), weights.to(device)]


def written_out(hidden: Tensor, output: Projection, targets: Tensor, weights: Tensor) -> LossSums:
    """Weighted cross-entropy by torch, with full logits."""
    logits = (hidden @ output.weight.t()).flatten(0, 1)
    if output.softcap is not None:
        logits = output.softcap * (logits / output.softcap).tanh()
    nll = F.cross_entropy(logits, targets.long().flatten(), reduction="none").view_as(weights)
    counted = torch.where(targets >= 0, weights, 0.0)
    each = nll * counted
    return LossSums(each.sum(), counted.sum(), each.detach())


def applied(
    loss: Callable[..., LossSums], given: list[Tensor], softcap: float | None = None, **more: Any
) -> LossSums:
    hidden, weight, *rest = given
    return loss(hidden, Projection(weight, softcap), *rest, **more)


def everything(
    loss: Callable[..., LossSums], given: list[Tensor], softcap: float | None = None
) -> list[Tensor]:
    sums = applied(loss, given, softcap)
    assert not sums.each.requires_grad
    # Twice the sum, so that the factor from above has to arrive.
    gradients = torch.autograd.grad(2 * sums.loss_sum, given[:2])
    return [x.detach().cpu().double() for x in (*sums[:3], *sums.terms, *gradients)]


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_sums_shares_and_gradients_are_those_written_out(softcap: float | None) -> None:
    found, expected = (
        everything(loss, example(torch.float32), softcap) for loss in (STAND_IN, written_out)
    )
    exact = everything(written_out, example(), softcap)
    assert exact[0] > 10 and exact[1] > 5
    for ours, theirs, double in zip(found, expected, exact, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours, double, rtol=1e-5, atol=1e-5)


def test_an_infinite_logit_where_nothing_counts_changes_nothing() -> None:
    given = example(torch.float32)
    plain = everything(STAND_IN, given)
    given[0].data[0, 4] = torch.inf  # no target
    given[0].data[2, 0] = torch.nan
    sums = applied(STAND_IN, given)
    assert sums.loss_sum.item() == plain[0].item() and torch.isfinite(sums.each).all()


def test_without_gradients_none_are_asked_for() -> None:
    asked = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs["compute_gradients"])
        return liger_stand_in.forward(*args, **kwargs)

    given = example(torch.float32)
    with torch.no_grad():
        applied(fused_cross_entropy, given, liger_forward=forward)
    applied(fused_cross_entropy, given, liger_forward=forward)
    assert asked == [False, True]


@pytest.mark.parametrize("chunks", [1, 3, 50])
def test_logits_of_supervised_tokens_alone_are_enough(chunks: int) -> None:
    seen = []

    def cross_entropy(hidden: Tensor, *others: Any) -> LossSums:
        seen.append(hidden.shape)
        return chunked_cross_entropy(hidden, *others, chunks=chunks)

    given = example(torch.float32)
    found = everything(partial(on_supervised_tokens, cross_entropy), given)
    for ours, double in zip(found, everything(written_out, example()), strict=True):
        torch.testing.assert_close(ours, double, rtol=1e-5, atol=1e-5)
    counted = int(((given[2] >= 0) & (given[3] > 0)).sum())
    assert seen == [(1, counted, D)] and counted <= B * S / 2


def test_blocks_without_any_supervised_token_have_a_gradient_of_zero() -> None:
    given = example(torch.float32)
    given[3] = torch.zeros_like(given[3])
    for zero in everything(partial(on_supervised_tokens, STAND_IN), given):
        assert zero.abs().max() == 0


KINDS = [
    (TokenLoss(0.2), None),
    (TokenLoss(z_loss=1e-2), None),
    (TokenLoss(z_loss=1e-2), 1.5),
    (TokenLoss(0.2, 1e-2), None),
]


@pytest.mark.parametrize(("kind", "softcap"), KINDS)
def test_variants_and_their_terms_are_those_of_the_chunked_loss(
    kind: TokenLoss, softcap: float | None
) -> None:
    """test_cross_entropy.py compares that with its definition."""
    fused = partial(on_supervised_tokens, partial(STAND_IN, kind=kind))
    chunked = partial(chunked_cross_entropy, chunks=3, kind=kind)
    found, expected = (
        everything(loss, example(torch.float32), softcap) for loss in (fused, chunked)
    )
    assert len(found) == 5 + len(kind.terms)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "softcap"), [*KINDS, (TokenLoss(), 1.5)])
def test_variants_by_liger_itself(kind: TokenLoss, softcap: float | None) -> None:
    liger = find_liger()
    if liger.forward is None:
        pytest.skip(liger.told)
    loss = partial(fused_cross_entropy, liger_forward=liger.forward, kind=kind)
    chunked = partial(chunked_cross_entropy, kind=kind)
    found, expected = (
        everything(each, example(torch.float32, "cuda"), softcap) for each in (loss, chunked)
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "off"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_liger_itself(dtype: torch.dtype, off: float) -> None:
    liger = find_liger()
    if liger.forward is None:
        pytest.skip(liger.told)
    loss = partial(fused_cross_entropy, liger_forward=liger.forward)
    found = everything(loss, example(dtype, "cuda"))
    expected = everything(
        written_out, [x.double() if x.is_floating_point() else x for x in example(dtype, "cuda")]
    )
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).abs().max() <= off * theirs.abs().max()


# Choosing -----------------------------------------------------------------------------------------

FOUND, MISSING = Liger(liger_stand_in.forward, "liger-kernel 0.8.5"), Liger(None, "not installed")


@pytest.mark.parametrize(
    ("wanted", "device", "liger", "expected"),
    [
        ("auto", "cuda", FOUND, ("liger", "auto on CUDA: liger-kernel 0.8.5")),
        ("auto", "cuda", MISSING, ("chunked", "auto on CUDA: not installed")),
        ("auto", "cpu", FOUND, ("chunked", "auto on cpu")),
        ("chunked", "cuda", FOUND, ("chunked", "as configured")),
        ("liger", "cuda", FOUND, ("liger", "as configured")),
    ],
)
def test_the_kernel_and_why(
    wanted: str, device: str, liger: Liger, expected: tuple[str, str]
) -> None:
    assert choose_loss(LossRequest(wanted), device, liger) == expected


def test_dft_is_not_given_to_liger() -> None:
    chosen, why = choose_loss(LossRequest(dft=True), "cuda", FOUND)
    assert chosen == "chunked" and "task.loss.dft=true" in why
    assert choose_loss(LossRequest(dft=True), "cuda", MISSING)[1] == "auto on CUDA: not installed"


def test_a_smoothed_loss_of_capped_logits_is_not_given_to_liger() -> None:
    chosen = choose_loss(LossRequest(), "cuda", FOUND)
    for request, softcap in ((LossRequest(smoothed=True), None), (LossRequest(), 30.0)):
        assert loss_for_softcap(request, chosen, softcap) == chosen
    kernel, why = loss_for_softcap(LossRequest(smoothed=True), chosen, 30.0)
    assert kernel == "chunked" and "final_logit_softcapping" in why
    assert loss_for_softcap(LossRequest(smoothed=True), ("chunked", "x"), 30.0)[1] == "x"
    with pytest.raises(ConfigError, match="loss_kernel=liger.*label_smoothing.*auto or chunked"):
        loss_for_softcap(LossRequest("liger", smoothed=True), ("liger", "as configured"), 30.0)


@pytest.mark.parametrize(
    ("device", "liger", "said"),
    [("cuda", MISSING, "liger: not installed.*torchprime"), ("cpu", FOUND, "CUDA only.*on cpu")],
)
def test_a_kernel_that_cannot_run_is_refused(device: str, liger: Liger, said: str) -> None:
    with pytest.raises(ConfigError, match=f"task.loss_kernel=.*{said}"):
        choose_loss(LossRequest("liger"), device, liger)


def test_liger_is_looked_for_and_asked_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_loss, "installed_version", lambda name: None)
    assert find_liger() == Liger(None, "liger-kernel is not installed")
    monkeypatch.setattr(fused_loss, "installed_version", lambda name: "0.5.0")
    module: Any = ModuleType("liger_kernel.ops.fused_linear_cross_entropy")
    for name in ("liger_kernel", "liger_kernel.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    assert "0.5.0 cannot be loaded" in find_liger().told
    # Before it took a weight per token it gave wrong gradients for them, without a word.
    module.fused_linear_cross_entropy_forward = lambda _input, weight, target, accum_dtype: None
    assert find_liger().forward is None and "no token_grad_output" in find_liger().told
    module.fused_linear_cross_entropy_forward = liger_stand_in.forward
    assert find_liger() == Liger(liger_stand_in.forward, "liger-kernel 0.5.0")
    assert set(NEEDED) < set(liger_stand_in.forward.__annotations__)
