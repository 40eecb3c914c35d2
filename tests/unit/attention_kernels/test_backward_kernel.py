"""Both kernels in Pallas' interpreter, against attention written out in float64."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from torchprime.attention_kernels.backward_kernel import backward
from torchprime.attention_kernels.blocks import Blocks
from torchprime.attention_kernels.forward_kernel import forward
from torchprime.attention_kernels.kernel_parts import Inputs, KernelOptions, in_rows

# Of 384 positions: three segments and padding; one that starts late in a block; an id that returns.
SEGMENTS = {
    "packed": [1] * 100 + [2] * 130 + [3] * 124 + [0] * 30,
    "one": [1] * 384,
    "halves": [1] * 128 + [2] * 128,
    "returning": [1] * 200 + [2] * 100 + [1] * 84,
}


def naive(given: list[np.ndarray], seen: np.ndarray, grad: np.ndarray, softcap: float | None):
    """Attention [H, S, h] with keys repeated per head: out, log-sum-exp, and the gradients."""
    q, k, v = given
    group = len(q) // len(k)
    wide_k, wide_v = np.repeat(k, group, 0), np.repeat(v, group, 0)
    products = np.einsum("hsd,htd->hst", q, wide_k)
    slope = np.ones_like(products)
    if softcap is not None:
        slope = 1 / np.cosh(products / softcap) ** 2
        products = softcap * np.tanh(products / softcap)
    scores = np.where(seen, products, -np.inf)
    top = scores.max(-1, keepdims=True)
    total = np.exp(scores - top).sum(-1, keepdims=True)
    p = np.exp(scores - top) / total
    out = p @ wide_v
    dp = grad @ wide_v.transpose(0, 2, 1)
    ds = p * (dp - (p * dp).sum(-1, keepdims=True)) * slope
    dk = np.einsum("hst,hsd->htd", ds, q).reshape(len(k), group, *k.shape[1:]).sum(1)
    dv = np.einsum("hst,hsd->htd", p, grad).reshape(len(k), group, *k.shape[1:]).sum(1)
    return out, (top + np.log(total))[..., 0], (ds @ wide_k, dk, dv)


def visible(ids: np.ndarray, window: int | None) -> np.ndarray:
    back = np.arange(len(ids))[:, None] - np.arange(len(ids))
    return (back >= 0) & (ids[:, None] == ids) & (back < (window or len(ids)))


class Row:
    """One row of queries, keys, values and gradient, and what is expected of it."""

    def __init__(
        self,
        heads: Sequence[int],
        segments: str,
        window: int | None,
        softcap: float | None = None,
        length: int = 384,
    ) -> None:
        H, K, h = heads
        r = np.random.default_rng(0)
        self.ids = np.array(SEGMENTS[segments][:length])
        self.window, self.softcap = window, softcap
        q, k, v, grad = (r.normal(size=(n, length, h)) for n in (H, K, K, H))
        self.given = [q * h**-0.5, k, v]
        self.grad = grad
        seen = visible(self.ids, window)
        self.out, self.log_sum_exp, self.gradients = naive(self.given, seen, grad, softcap)

    def kernels(self, blocks: Blocks) -> tuple[list[jax.Array], list[jax.Array]]:
        """Return what the forward returns, and the backward after it."""
        first = [int(np.argmax(self.ids == each)) for each in self.ids]
        # A row of one segment in front of it, so that rows are not mixed up.
        plain = np.stack([np.ones_like(self.ids), np.zeros_like(self.ids)])
        segments = jnp.asarray(np.stack([plain, np.stack([self.ids, first])]), jnp.int32)
        options = KernelOptions(blocks, self.window, self.softcap, interpret=True)
        q, k, v, grad = (
            jnp.asarray(np.stack([np.ones_like(x), x]), jnp.float32)
            for x in (*self.given, self.grad)
        )
        given = Inputs(q, k, arranged(v), segments)
        out, log_sum_exp = forward(given, options)
        dq, dk, dv = backward(given, out, log_sum_exp, arranged(grad), options)
        apart = [by_heads(each, q.shape[-1])[1] for each in (out, dv)]
        return [apart[0], log_sum_exp[1]], [dq[1], dk[1], apart[1]]


def arranged(x: jax.Array) -> jax.Array:
    """Values and gradients [B, heads, S, h] as the kernels take them."""
    rows, heads, length, h = x.shape
    return jnp.swapaxes(x, 1, 2).reshape(rows, length, heads * h) if in_rows(h) else x


def by_heads(x: jax.Array, h: int) -> jax.Array:
    """Results of the kernels as [B, heads, S, h]."""
    return jnp.swapaxes(x.reshape(*x.shape[:2], -1, h), 1, 2) if in_rows(h) else x


@pytest.mark.parametrize(
    ("heads", "segments", "seen", "sizes"),
    [
        ((4, 2, 64), "packed", (None, None), (128, 128, 384, 384)),
        ((2, 2, 128), "one", (100, None), (384, 128, 384, 384)),  # one block of queries, a window
        ((4, 1, 64), "packed", (40, None), (128, 128, 256, 128)),  # spans: partial results
        ((2, 1, 32), "returning", (None, 0.7), (128, 384, 384, 384)),  # capped
        ((4, 1, 64), "packed", (40, 0.7), (128, 128, 256, 128)),
        ((4, 2, 128), "packed", (None, None), (128, 128, 256, 128)),  # heads side by side, spans
        ((4, 2, 128), "packed", (None, 0.7), (128, 128, 256, 128)),
    ],
)
def test_kernels_are_attention_written_out(
    heads: Sequence[int],
    segments: str,
    seen: tuple[int | None, float | None],
    sizes: Sequence[int],
) -> None:
    """`seen` is the window, then the soft-cap."""
    length = 256 if sizes[2] == 256 else 384
    row = Row(heads, segments, *seen, length=length)
    results, gradients = row.kernels(Blocks(*sizes))
    expected = [row.out, row.log_sum_exp, *row.gradients]
    for ours, wanted in zip([*results, *gradients], expected, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=2e-6 * np.abs(wanted).max())


def test_keys_before_the_segments_of_a_block_are_not_computed() -> None:
    """NaN in keys and values of the first segment does not reach later blocks of queries."""
    row = Row((1, 1, 32), "halves", None, length=256)
    row.given[1][:, :128], row.given[2][:, :128] = np.nan, np.nan
    results, gradients = row.kernels(Blocks(128, 128, 256, 256))
    for ours, wanted in zip(
        [*results, *gradients], [row.out, row.log_sum_exp, *row.gradients], strict=True
    ):
        np.testing.assert_allclose(ours[:, 128:], wanted[:, 128:], rtol=0, atol=1e-5)
