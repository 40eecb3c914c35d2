"""The backward kernel in Pallas' interpreter, against attention written out in float64."""

from __future__ import annotations

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import pytest

from torchprime.torch_xla_models.splash.backward_kernel import backward
from torchprime.torch_xla_models.splash.blocks import Blocks

# Of 384 positions: three segments and padding; one that starts late in a block; an id that returns.
SEGMENTS = {
    "packed": [1] * 100 + [2] * 130 + [3] * 124 + [0] * 30,
    "one": [1] * 384,
    "returning": [1] * 200 + [2] * 100 + [1] * 84,
}


def naive(q: np.ndarray, k: np.ndarray, v: np.ndarray, seen: np.ndarray, grad: np.ndarray):
    """Attention [H, S, h] with keys repeated per head: out, log-sum-exp, and the gradients."""
    group = len(q) // len(k)
    wide_k, wide_v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    scores = np.where(seen, np.einsum("hsd,htd->hst", q, wide_k), -np.inf)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    p = np.exp(scores - top) / total
    out = p @ wide_v
    dp = grad @ wide_v.transpose(0, 2, 1)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True))
    dk = np.einsum("hst,hsd->htd", ds, q).reshape(len(k), group, *k.shape[1:]).sum(1)
    dv = np.einsum("hst,hsd->htd", p, grad).reshape(len(k), group, *k.shape[1:]).sum(1)
    return out, (top + np.log(total))[..., 0], (ds @ wide_k, dk, dv)


def visible(ids: np.ndarray, window: int | None) -> np.ndarray:
    back = np.arange(len(ids))[:, None] - np.arange(len(ids))
    return (back >= 0) & (ids[:, None] == ids) & (back < (window or len(ids)))


@pytest.mark.parametrize(
    ("heads", "segments", "window", "sizes"),
    [
        ((4, 2, 64), "packed", None, (128, 128, 384)),
        ((2, 2, 128), "one", 100, (384, 128, 384)),  # one block of queries, a window
        ((4, 1, 64), "packed", 40, (128, 128, 128)),  # spans: partial dq
        ((2, 1, 32), "returning", None, (128, 384, 384)),
    ],
)
def test_gradients_are_those_of_attention_written_out(
    heads: Sequence[int], segments: str, window: int | None, sizes: Sequence[int]
) -> None:
    H, K, h = heads
    ids = np.array(SEGMENTS[segments])
    S = len(ids)
    r = np.random.default_rng(0)
    q, k, v, grad = (r.normal(size=(n, S, h)) for n in (H, K, K, H))
    q *= h**-0.5
    out, log_sum_exp, expected = naive(q, k, v, visible(ids, window), grad)
    first = [int(np.argmax(ids == each)) for each in ids]
    floats = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    results = [jnp.asarray(x, jnp.float32) for x in (out, log_sum_exp, grad)]
    integers = [jnp.asarray(x, jnp.int32) for x in (ids, first)]
    blocks = Blocks(0, 0, *sizes)
    found = backward(*floats, *integers, *results, blocks=blocks, window=window, interpret=True)
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_keys_before_the_segments_of_a_block_are_not_computed() -> None:
    """NaN in keys and values of an earlier segment does not reach the gradients of later blocks."""
    r = np.random.default_rng(0)
    ids = np.repeat([1, 2], 128)
    q, k, v, grad = (r.normal(size=(1, 256, 32)) for _ in range(4))
    q *= 32**-0.5
    out, log_sum_exp, expected = naive(q, k, v, visible(ids, None), grad)
    first = jnp.asarray(np.repeat([0, 128], 128), jnp.int32)
    k[:, :128], v[:, :128] = np.nan, np.nan
    floats = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    results = [jnp.asarray(x, jnp.float32) for x in (out, log_sum_exp, grad)]
    blocks = Blocks(0, 0, 128, 128, 256)
    found = backward(
        *floats, jnp.asarray(ids, jnp.int32), first, *results, blocks=blocks, interpret=True
    )
    for ours, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours[:, 128:], wanted[:, 128:], rtol=0, atol=1e-5)
