"""The number of chunks of a loss, by the bytes of their logits."""

from __future__ import annotations

import pytest
import torch

from torchprime.config.topologies import CHIPS
from torchprime.losses.chunks import (
    ChunkBytes,
    Projection,
    Spread,
    balanced_chunk,
    chunks_for,
    tpu_chunk_bytes,
)
from torchprime.losses.cross_entropy import chunked_cross_entropy

B, S, D, V = 2, 16, 16, 24
V5E, V6E = (tpu_chunk_bytes(CHIPS[name].hbm_bytes) for name in ("v5e", "v6e"))


@pytest.mark.parametrize(
    ("rows", "length", "vocabulary", "most", "chunks"),
    [
        (1, 8192, 128256, tpu_chunk_bytes(None).trained, 4),  # 3.9 GiB
        (1, 8192, 128256, tpu_chunk_bytes(None).frozen, 4),
        (8, 1024, 128256, V6E.trained, 1),
        (1, 8192, 151936, V6E.trained, 1),  # Qwen3's
        (8, 1024, 128256, V6E.frozen, 4),
        (1, 8192, 128256, V5E.trained, 2),
        (1, 8192, 128256, V5E.frozen, 8),
        (1, 64, 1000, 2**28, 1),
        (1, 4, 1000, 1, 4),  # not more than tokens
    ],
)
def test_as_few_chunks_as_fit(
    rows: int, length: int, vocabulary: int, most: int, chunks: int
) -> None:
    assert chunks_for(rows, length, vocabulary, most) == chunks
    if 1 < chunks < length:
        assert 4 * rows * length * vocabulary <= most * chunks
        assert 4 * rows * length * vocabulary > most * (chunks - 1)


def test_a_balanced_chunk_computes_as_long_as_it_reads_and_writes() -> None:
    """The product for the gradient of a [V, D] weight, and its fp32 sum once there and back."""
    for chip in CHIPS.values():
        tokens = balanced_chunk(chip.flops, chip.hbm_bytes_per_s)
        compute = 2 * tokens * V * D / chip.flops
        memory = 2 * 4 * V * D / chip.hbm_bytes_per_s
        assert memory <= compute < memory * (1 + 1 / (tokens - 1))


def gradients(chunks: int | None, spread: Spread, *, trained: bool = True) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(B, S, D, generator=generator).requires_grad_()
    w = torch.randn(V, D, generator=generator).requires_grad_(trained)
    targets = torch.randint(0, V, (B, S), generator=generator)
    loss = chunked_cross_entropy(x, Projection(w), targets, torch.ones(B, S), chunks, spread)
    return list(torch.autograd.grad(loss.loss_sum, (x, w) if trained else (x,)))


def test_chunks_by_bytes_are_those_of_their_number() -> None:
    """The rows of a group are one device's; float32 sums depend on the number of chunks."""
    for groups in (1, B):
        most = 4 * V * (B // groups) * (S // 4)
        by_bytes = gradients(None, Spread(groups, chunk_bytes=ChunkBytes(most, 1)))
        by_number, whole = gradients(4, Spread(groups)), gradients(1, Spread(groups))
        assert all(torch.equal(a, b) for a, b in zip(by_bytes, by_number, strict=True))
        torch.testing.assert_close(by_bytes, whole, rtol=1e-5, atol=1e-5)


def test_a_frozen_weight_has_chunks_of_its_own() -> None:
    counted = 0

    def in_order(later: torch.Tensor, earlier: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal counted
        counted += 1
        return later, earlier

    spread = Spread(in_order=in_order, chunk_bytes=ChunkBytes(4 * V * B * S, 4 * V * B * 2))
    gradients(None, spread)
    assert counted == 0  # one chunk
    gradients(None, spread, trained=False)
    assert counted == S // 2 - 1
