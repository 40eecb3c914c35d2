"""Held-out loss, against the weighted mean over all tokens of hand-made blocks."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.order import EMPTY_BLOCK
from torchprime.data.tokens.completions import Example
from torchprime.evaluation.heldout import heldout_loss, loss_by_logprobs

BLOCKS, S = 5, 4
g = np.random.default_rng(2)
WEIGHTS = g.integers(0, 3, (BLOCKS, S)).astype(np.float32)
LOSSES = g.random((BLOCKS, S))
SOURCES = g.integers(0, 2, (BLOCKS, S)).astype(np.int32)
SOURCES[SOURCES == 1] = 2  # the second of three sources has no token


class Data:
    """Blocks whose ids are the index of their token."""

    num_blocks = BLOCKS

    def __init__(self, names: list[str]) -> None:
        self.source_names = names

    def batch(self, indices: np.ndarray) -> Batch:
        full = indices != EMPTY_BLOCK
        ids = np.where(full[:, None], indices[:, None] * S + np.arange(S), 0).astype(np.int32)
        weights = np.where(full[:, None], WEIGHTS[indices], 0).astype(np.float32)
        zeros = np.zeros_like(ids)
        mixed = len(self.source_names) > 1
        sources = np.where(full[:, None], SOURCES[indices], 0).astype(np.int32) if mixed else None
        return Batch(ids, zeros, weights, zeros, zeros, sources)


class Backend:
    """Sums the losses of the tokens; remembers the shapes."""

    def __init__(self) -> None:
        self.shapes: set[tuple[int, ...]] = set()

    def put(self, batch: Batch, accumulation: int) -> Batch:
        self.shapes.add(batch.input_ids.shape)
        return batch

    def eval_step(self, batch: Batch, num_sources: int = 1) -> Any:
        each = LOSSES.reshape(-1)[batch.input_ids] * batch.loss_weights
        sums = (
            []
            if batch.source_ids is None
            else [each[batch.source_ids == source].sum() for source in range(num_sources)]
        )
        return each.sum(), batch.weight_sum, *sums

    def read_eval(self, handles: list[Any]) -> tuple[float, ...]:
        return tuple(map(sum, zip(*handles, strict=True)))


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_the_mean_does_not_depend_on_the_batches(size: int) -> None:
    backend = Backend()
    found = heldout_loss(backend, cast(PackedDataset, Data(["only"])), size)
    assert found.mean == pytest.approx((LOSSES * WEIGHTS).sum() / WEIGHTS.sum())
    assert found.by_source is None and backend.shapes == {(size, S)}


@pytest.mark.parametrize("size", [2, 5])
def test_each_source_has_its_own_mean(size: int) -> None:
    found = heldout_loss(Backend(), cast(PackedDataset, Data(["a", "b", "c"])), size)
    assert found.mean == pytest.approx((LOSSES * WEIGHTS).sum() / WEIGHTS.sum())
    assert found.by_source is not None and found.by_source["b"] is None
    for name, source in (("a", 0), ("c", 2)):
        here = source == SOURCES
        expected = (LOSSES * WEIGHTS)[here].sum() / WEIGHTS[here].sum()
        assert found.by_source[name] == pytest.approx(expected)


@pytest.mark.parametrize("batch_size", [1, 2, 9])
@pytest.mark.parametrize("sources", [["a"], ["a", "b", "c"]])
def test_scored_sequences_give_the_mean_over_all_tokens(
    batch_size: int, sources: list[str]
) -> None:
    """Log-probabilities that are a function of the id: the mean is computed from the examples."""
    random = np.random.default_rng(3)
    examples = []
    for number, length in enumerate((3, 7, 2, 5, 20)):  # the last one is split into blocks
        weights = random.integers(0, 3, length).astype(np.float32) * (np.arange(length) > 0)
        weights[-1] = 1.0
        ids = random.integers(1, 100, length).astype(np.int32)
        rules = np.zeros(length, np.uint8)
        source = sources[0 if number < 3 else -1]
        examples.append(
            Example(str(number), ids, weights, rules, "x", source=source, divisible=length > 8)
        )
    data = PackedDataset.from_examples(examples, block_size=8, pad_id=0, packing="bfd")
    asked: list[int] = []

    def logprobs_of(sequences: Any) -> list[list[float]]:
        asked.extend(map(len, sequences))
        return [[-n / 100 for n in ids[1:]] for ids in sequences]

    found = loss_by_logprobs(logprobs_of, data, batch_size)
    pairs = {e.row_id: (float(e.weights @ e.ids) / 100, float(e.weights.sum())) for e in examples}
    total, weight = (sum(column) for column in zip(*pairs.values(), strict=True))
    assert found.mean == pytest.approx(total / weight)
    assert max(asked) <= 9  # a block, and the target that follows it
    if len(data.source_names) > 1:
        first = [pairs[name] for name in ("0", "1", "2")]
        assert found.by_source is not None
        assert found.by_source["a"] == pytest.approx(
            sum(p[0] for p in first) / sum(p[1] for p in first)
        )
