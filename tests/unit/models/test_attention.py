"""The reference attention, against one query at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from torchprime.models import attention
from torchprime.models.attention import ReferenceAttention

SEGMENTS = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 2, 2, 2]])


def one_by_one(q: Tensor, k: Tensor, v: Tensor, segments: Tensor, window: int | None) -> Tensor:
    """Return the mixed values of each query, computed alone."""
    out = torch.zeros_like(q, dtype=torch.float64)
    shared = q.shape[1] // k.shape[1]  # heads per kv head
    for b, head, s in torch.cartesian_prod(*map(torch.arange, q.shape[:3])).tolist():
        first = 0 if window is None else max(0, s - window + 1)
        keys = [j for j in range(first, s + 1) if segments[b, j] == segments[b, s]]
        scores = k[b, head // shared, keys].double() @ q[b, head, s].double()
        shares = torch.softmax(scores / math.sqrt(q.shape[-1]), 0)
        out[b, head, s] = shares @ v[b, head // shared, keys].double()
    return out


@pytest.mark.parametrize("rows", [2, 128])
@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_each_query_sees_its_segments_past(
    monkeypatch: pytest.MonkeyPatch, rows: int, window: int | None, kv_heads: int
) -> None:
    monkeypatch.setattr(attention, "SMALLEST_GROUP", rows)  # with 2, several groups of rows
    g = torch.Generator().manual_seed(5)
    q = torch.randn(2, 4, 9, 6, generator=g)
    k, v = (torch.randn(2, kv_heads, 9, 6, generator=g) for _ in range(2))
    core = ReferenceAttention(6, window)
    found = core(q, k, v, core.prepare(SEGMENTS))
    expected = one_by_one(q, k, v, SEGMENTS, window)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_padding_gives_finite_values_and_gradients() -> None:
    q, k, v = (torch.randn(1, 2, 4, 6, requires_grad=True) for _ in range(3))
    core = ReferenceAttention(6)
    out = core(q, k, v, core.prepare(torch.zeros(1, 4, dtype=torch.int32)))
    out.sum().backward()
    assert all(bool(t.grad is not None and t.grad.isfinite().all()) for t in (q, k, v))


def test_the_result_has_the_queries_type() -> None:
    q, k, v = (torch.randn(1, 2, 4, 6).bfloat16() for _ in range(3))
    core = ReferenceAttention(6)
    mask = core.prepare(torch.ones(1, 4, dtype=torch.int32))
    assert mask.dtype == torch.float32 and core(q, k, v, mask).dtype == torch.bfloat16
