"""The sums of squared gradients that a Fisher information is made of."""

from __future__ import annotations

import numpy as np
import torch

from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.tokens.completions import Example
from torchprime.training.fisher import SQUARES, SquaredGradients, one_by_one
from torchprime.training.optim.optimizer import Parameter


def example(length: int) -> Example:
    ids = np.arange(1, length + 1, dtype=np.int32)
    weights = np.ones(length, np.float32)
    return Example(str(length), ids, weights, np.zeros(length, np.uint8), "prompt")


def test_each_example_is_alone_and_none_is_lost() -> None:
    lengths = [3, 5, 2, 4]
    packed = PackedDataset.from_examples(
        [example(length) for length in lengths], block_size=8, pad_id=0, packing="bfd"
    )
    assert packed.num_blocks == 2
    apart = one_by_one(packed)
    batch = apart.batch(np.arange(apart.num_blocks))
    assert sorted(np.count_nonzero(batch.segment_ids, axis=1)) == sorted(lengths)
    assert batch.segment_ids.max() == 1


def test_weights_stay_and_squares_are_of_the_summed_loss() -> None:
    optimizer = SquaredGradients()
    parameter = Parameter(("w",), (2,), torch.float32)
    weight, squares = torch.tensor([1.0, 2.0]), torch.zeros(2)
    for gradient, count in ((torch.tensor([1.0, -2.0]), 3.0), (torch.tensor([0.5, 0.0]), 2.0)):
        state = {SQUARES: squares}
        lr, step = torch.tensor(count), torch.tensor(1.0)
        new = optimizer.update(parameter, weight, gradient, state, lr, step)
        assert torch.equal(new["weight"], weight)
        squares = new[SQUARES]
    assert squares.tolist() == [9 + 1, 36]
