"""Every example lies in one block and fits; blocks are nearly full."""

from __future__ import annotations

import json
from pathlib import Path
from typing import get_args

import numpy as np
import pytest

from torchprime.config.sections.dataset import Packing
from torchprime.data.blocks.pack import Plan, pack
from torchprime.data.rows.read import QUESTION_PROMPT
from torchprime.data.tokenizer.load import load_tokenizer


def naive_first_fit_decreasing(lengths: list[int], block_size: int) -> list[list[int]]:
    blocks: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        for block in blocks:
            if sum(block) + length <= block_size:
                block.append(length)
                break
        else:
            blocks.append([length])
    return blocks


def blocks_of(lengths: np.ndarray, block_size: int, packing: Packing) -> list[list[int]]:
    plan = pack(lengths, block_size, packing)
    ends = zip(plan.starts[:-1].tolist(), plan.starts[1:].tolist(), strict=True)
    return [plan.examples[start:end].tolist() for start, end in ends]


def distributions() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "one": np.array([5]),
        "full": np.full(9, 64),
        "ones": np.ones(1000, dtype=int),
        "two of a kind": np.array([32, 32]),
        "odd one out": np.array([40, 12, 12, 12]),
        "large only": rng.integers(33, 65, 200),
        "uniform": rng.integers(1, 65, 500),
        "mostly short": np.clip(rng.lognormal(2, 0.8, 500), 1, 64).astype(int),
    }


@pytest.mark.parametrize("name", distributions())
def test_every_example_once_and_none_over_the_block_size(name: str) -> None:
    lengths = distributions()[name]
    blocks = blocks_of(lengths, 64, "bfd")
    assert sorted(i for block in blocks for i in block) == list(range(len(lengths)))
    assert all(block and lengths[block].sum() <= 64 for block in blocks)


@pytest.mark.parametrize("name", distributions())
def test_no_more_blocks_than_first_fit_decreasing(name: str) -> None:
    lengths = distributions()[name]
    reference = naive_first_fit_decreasing(lengths.tolist(), 64)
    assert len(blocks_of(lengths, 64, "bfd")) <= len(reference)


def test_the_finishing_pair_beats_first_fit() -> None:
    # First fit takes 50 + 40 and needs three blocks; 50 + 25 + 25 and 40 + 30 + 30 are two.
    lengths = np.array([25, 30, 50, 25, 40, 30])
    assert len(blocks_of(lengths, 100, "bfd")) == 2
    assert len(naive_first_fit_decreasing(lengths.tolist(), 100)) == 3


def test_same_lengths_same_plan_and_equal_lengths_in_file_order() -> None:
    lengths = distributions()["uniform"]
    first, second = pack(lengths, 64, "bfd"), pack(lengths, 64, "bfd")
    assert first.examples.tolist() == second.examples.tolist()
    for length in np.unique(lengths):
        places = [i for i in first.examples.tolist() if lengths[i] == length]
        assert places == sorted(places)


def tokens_of(plan: Plan) -> list[tuple[int, int]]:
    """(example, place in it) of every slot in use, in block order."""
    trios = zip(plan.examples.tolist(), plan.begins.tolist(), plan.lengths.tolist(), strict=True)
    return [(e, begin + i) for e, begin, length in trios for i in range(length)]


@pytest.mark.parametrize("packing", ["none", "bfd_split", "wrapped"])
def test_longer_than_a_block_is_cut_and_whole_again(packing: Packing) -> None:
    lengths = np.random.default_rng(2).integers(1, 300, 60)
    plan = pack(lengths, 64, packing)
    tokens = tokens_of(plan)
    assert sorted(tokens) == [(e, i) for e, n in enumerate(lengths.tolist()) for i in range(n)]
    used = np.add.reduceat(plan.lengths, plan.starts[:-1])
    assert used.max() <= 64
    if packing == "wrapped":
        assert tokens == sorted(tokens)
        assert (used[:-1] == 64).all()


def test_only_the_chosen_examples() -> None:
    lengths = np.array([5, 6, 7, 8, 90])
    for packing in get_args(Packing):
        plan = pack(lengths, 16, packing, [1, 3])
        assert sorted(plan.examples.tolist()) == [1, 3]


def test_none_keeps_file_order_one_example_per_block() -> None:
    assert blocks_of(np.array([3, 1, 2]), 4, "none") == [[0], [1], [2]]


def test_gsm8k_fills_at_least_99_percent(shared_dir: Path) -> None:
    # Harder than with a large vocabulary: longer examples, fewer to a block.
    tokenizer = load_tokenizer(shared_dir / "models/stories260K")
    with open(shared_dir / "data/gsm8k/train.jsonl", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    texts = [QUESTION_PROMPT.format(question=row["question"]) + row["answer"] for row in rows]
    lengths = np.array([len(ids) + 1 + tokenizer.add_bos for ids in tokenizer.encode_ids(texts)])
    lengths = lengths[lengths <= 1024]
    assert lengths.sum() / (pack(lengths, 1024, "bfd").num_blocks * 1024) >= 0.99
