"""The kernels as operations of a graph, against the reference core."""

from __future__ import annotations

import pytest
import torch
from eager_chips import Chips, Each
from torch import Tensor

from torchprime.models.attention import ReferenceAttention
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.kernels import KERNELS, KernelAttention
from torchprime.torch_native.tpu.loops import traced

LENGTH = 256
SEGMENTS = [1] * 70 + [2] * 130 + [3] * 40 + [0] * 16


def results(core: torch.nn.Module, *given: Tensor) -> list[Tensor]:
    """The result of a core and the gradients of q, k and v."""
    *leaves, grad, ids = given
    with torch.enable_grad():
        leaves = [each.detach().requires_grad_() for each in leaves]
        out = core(*leaves, core.prepare(ids))  # pyright: ignore[reportCallIssue]
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


@pytest.mark.parametrize(("h", "window", "softcap"), [(16, None, None), (128, 60, 0.7)])
def test_result_and_gradients_are_the_references(
    h: int, window: int | None, softcap: float | None
) -> None:
    torch.manual_seed(0)
    given = [torch.randn(2, heads, LENGTH, h) for heads in (4, 2, 2, 4)]
    given.append(torch.tensor([SEGMENTS, SEGMENTS[::-1]], dtype=torch.int32))
    graph = traced(lambda *x: results(KernelAttention(h, window, softcap), *x), given)
    found = [each.values[0] for each in Chips(graph, Grid()).run(*(Each([x]) for x in given))]
    expected = results(ReferenceAttention(h, window, softcap), *given)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


def test_one_kernel_has_one_name() -> None:
    given = [torch.randn(1, 2, LENGTH, 32) for _ in range(4)]
    given.append(torch.tensor([SEGMENTS], dtype=torch.int32))

    def twice(*x: Tensor) -> list[Tensor]:
        return [*results(KernelAttention(32), *x), *results(KernelAttention(32), *x)]

    before = len(KERNELS)
    traced(twice, given)
    assert len(KERNELS) - before == 2
