"""Batches hold every example intact, apart and once; padding carries nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from torchprime.config.sections.dataset import Packing
from torchprime.data.blocks.batch import FIELDS, Batch
from torchprime.data.blocks.budget import batch_budget
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.tokens.completions import Example

PAD = 9
BLOCK = 16


def make_examples(count: int = 40) -> list[Example]:
    """Random ids in which PAD occurs too: nothing may tell padding by its id."""
    rng = np.random.default_rng(0)
    examples = []
    for n in range(count):
        length = int(rng.integers(2, BLOCK + 1))
        supervised = np.arange(length) >= rng.integers(1, length)
        ids = rng.integers(0, 12, length).astype(np.int32)
        examples.append(example(f"f:{n}", ids, supervised * rng.choice([0.5, 1.0, 3.0])))
    return examples


def example(row_id: str, ids: np.ndarray, weights: np.ndarray, source: str = "") -> Example:
    rules = np.where(weights > 0, 2, 0).astype(np.uint8)
    return Example(row_id, ids.astype(np.int32), weights.astype(np.float32), rules, "joint", source)


def make_packed(packing: Packing = "bfd") -> PackedDataset:
    return PackedDataset.from_examples(
        make_examples(), block_size=BLOCK, pad_id=PAD, packing=packing
    )


def every(batch: Batch, change: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    return {name: change(array) for name, array in batch.arrays().items()}


def all_blocks(packed: PackedDataset) -> Batch:
    return packed.batch(np.arange(packed.num_blocks))


@pytest.mark.parametrize("packing", ["bfd", "none"])
def test_every_example_once_intact_and_apart(packing: Packing) -> None:
    packed = make_packed(packing)
    batch = all_blocks(packed)
    found = []
    for row in range(packed.num_blocks):
        segments = batch.segment_ids[row]
        count = segments.max()
        assert count == 1 or packing == "bfd"
        used = np.count_nonzero(segments)
        assert (np.diff(segments[:used]) >= 0).all()
        assert set(segments[:used].tolist()) == set(range(1, count + 1))
        for segment in range(1, count + 1):
            here = segments == segment
            ids, targets = batch.input_ids[row, here], batch.targets[row, here]
            assert batch.position_ids[row, here].tolist() == list(range(len(ids)))
            assert targets[-1] == -100, "a segment's last token would predict its neighbour"
            assert all(t in (-100, i) for t, i in zip(targets[:-1], ids[1:], strict=True))
            weights = batch.loss_weights[row, here]
            assert ((weights > 0) == (targets != -100)).all()
            found.append((ids.tolist(), [0.0, *weights[:-1].tolist()]))
    expected = [(e.ids.tolist(), e.weights.tolist()) for e in make_examples()]
    assert sorted(found) == sorted(expected)


def test_padding_and_empty_blocks() -> None:
    packed = make_packed()
    batch = packed.batch(np.array([-1, packed.num_blocks - 1, -1]))
    padding = batch.segment_ids == 0
    assert padding[[0, 2]].all()
    assert not padding[1].all()
    assert (batch.input_ids[padding] == PAD).all()
    assert (batch.targets[padding] == -100).all()
    assert not batch.loss_weights[padding].any()
    assert not batch.position_ids[padding].any()
    assert packed.batch(np.array([-1])).weight_sum == 0


def test_counts_agree_with_the_examples() -> None:
    examples, packed = make_examples(), make_packed()
    real = sum(len(e.ids) for e in examples)
    supervised = sum(int(e.supervised.sum()) for e in examples)
    batch = all_blocks(packed)
    assert packed.num_examples == len(examples)
    assert packed.real_tokens == batch.real_tokens == real
    assert packed.supervised_tokens == batch.supervised_tokens == supervised
    assert batch.weight_sum == sum(float(e.weights.sum()) for e in examples)
    assert batch.slot_tokens == packed.num_blocks * BLOCK
    assert packed.efficiency == real / (packed.num_blocks * BLOCK)
    assert ((batch.loss_weights > 0) == (batch.targets != -100)).all()


def test_types_and_shapes() -> None:
    batch = make_packed().batch(np.array([0, -1, 1, 0]))
    for name, array in batch.arrays().items():
        assert array.shape == (4, BLOCK)
        assert array.dtype == (np.float32 if name == "loss_weights" else np.int32)


@pytest.mark.parametrize("wrong", [[-2], [10_000], [[0]]])
def test_indices_that_are_none(wrong: list) -> None:
    with pytest.raises(IndexError, match="expected a list of block indices from -1 to"):
        make_packed().batch(np.array(wrong))


@pytest.mark.parametrize("field", FIELDS)
def test_hash_sees_every_array(field: str) -> None:
    batch = make_packed().batch(np.array([0, 1]))
    same = Batch(**every(batch, np.copy))
    assert batch.hash() == same.hash()
    assert len(batch.hash()) == 16
    assert int(batch.hash(), 16) >= 0
    changed = getattr(batch, field).copy()
    changed[1, -1] += 1
    assert replace(batch, **{field: changed}).hash() != batch.hash()


def test_hash_sees_shape_name_and_order_of_blocks() -> None:
    batch = make_packed().batch(np.array([0, 1]))
    flat = Batch(**every(batch, lambda array: array.reshape(1, -1)))
    swapped = replace(batch, position_ids=batch.segment_ids, segment_ids=batch.position_ids)
    other = make_packed().batch(np.array([1, 0]))
    assert len({b.hash() for b in (batch, flat, swapped, other)}) == 4


def test_hash_does_not_depend_on_memory_layout() -> None:
    batch = make_packed().batch(np.array([0, 1]))
    assert Batch(**every(batch, np.asfortranarray)).hash() == batch.hash()


def test_fingerprint_sees_content_and_packing() -> None:
    examples = make_examples()

    def fingerprint(changed: list[Example], pad_id: int = PAD, packing: Packing = "bfd") -> str:
        return PackedDataset.from_examples(
            changed, block_size=BLOCK, pad_id=pad_id, packing=packing
        ).fingerprint()

    ids, weights = examples[3].ids.copy(), examples[3].weights + 1
    ids[0] += 1
    other_ids = [*examples[:3], replace(examples[3], ids=ids), *examples[4:]]
    other_weights = [*examples[:3], replace(examples[3], weights=weights), *examples[4:]]
    prints = {
        fingerprint(examples),
        fingerprint(other_ids),
        fingerprint(other_weights),
        fingerprint(examples[1:]),
        fingerprint(examples, pad_id=0),
        fingerprint(examples, packing="none"),
    }
    assert len(prints) == 6
    assert fingerprint(examples) == fingerprint(make_examples())


def test_budget_adds_up_over_an_epoch() -> None:
    packed = make_packed()
    budget = batch_budget(packed, seed=1, global_batch_size=4)
    steps = budget["steps_per_epoch"]
    assert steps == -(-packed.num_blocks // 4)
    assert budget["blocks"] == packed.num_blocks
    assert steps * 4 - budget["empty_blocks_in_last_update"] == packed.num_blocks
    assert budget["slot_tokens_per_update"] == {"mean": 64.0, "min": 64, "max": 64}
    real, supervised = budget["real_tokens_per_update"], budget["supervised_tokens_per_update"]
    assert real["mean"] * steps == pytest.approx(packed.real_tokens)
    assert supervised["mean"] * steps == pytest.approx(packed.supervised_tokens)
    assert 0 < supervised["min"] <= supervised["mean"] <= supervised["max"] <= real["max"] <= 64


def stream_of(packed: PackedDataset) -> tuple[list[int], list[tuple[int, float]]]:
    """All ids in block order, and what each of them predicts with what weight."""
    batch = all_blocks(packed)
    real = batch.segment_ids > 0
    pairs = zip(batch.targets[real].tolist(), batch.loss_weights[real].tolist(), strict=True)
    return batch.input_ids[real].tolist(), list(pairs)


@pytest.mark.parametrize("packing", ["bfd_split", "wrapped"])
def test_cutting_loses_no_label(packing: Packing) -> None:
    """The multiset of (token, what it predicts) is that of the examples, cut or not."""
    rng = np.random.default_rng(1)
    examples = []
    for n in range(30):
        length = int(rng.integers(2, 5 * BLOCK))
        weights = (np.arange(length) >= rng.integers(1, length)) * 2.0
        examples.append(example(f"f:{n}", rng.integers(0, 99, length), weights))
    packed = PackedDataset.from_examples(examples, block_size=BLOCK, pad_id=PAD, packing=packing)
    ids, pairs = stream_of(packed)
    expected = []
    for one in examples:
        nexts = [*one.weights[1:].tolist(), 0.0]
        expected += list(zip(one.ids.tolist(), one.targets().tolist(), nexts, strict=True))
    found = [(i, target, weight) for i, (target, weight) in zip(ids, pairs, strict=True)]
    assert sorted(found) == sorted(expected)
    if packing == "wrapped":
        assert found == expected, "wrapped keeps the order"
        assert packed.num_blocks == -(-len(expected) // BLOCK), "and leaves no slot empty"
    assert packed.supervised_tokens == sum(int((e.weights[1:] > 0).sum()) for e in examples)


def test_sources_are_known_slot_by_slot() -> None:
    weights = np.array([0.0, 1.0, 2.0])
    examples = [
        example(f"f:{n}", np.full(3, n), weights, "general" if n % 3 == 0 else "own")
        for n in range(9)
    ]
    packed = PackedDataset.from_examples(examples, block_size=BLOCK, pad_id=PAD, packing="bfd")
    batch = all_blocks(packed)
    assert sorted(packed.source_names) == ["general", "own"]
    assert batch.source_ids is not None
    for name, count in (("general", 3), ("own", 6)):
        place = packed.source_names.index(name)
        mine = (batch.source_ids == place) & (batch.segment_ids > 0)
        assert {int(i) % 3 == 0 for i in batch.input_ids[mine]} == {name == "general"}
        assert batch.source_weights(2)[place] == 3.0 * count
    assert make_packed().batch(np.array([0])).source_ids is None


def test_rules_stand_beside_their_tokens() -> None:
    packed = make_packed()
    batch = all_blocks(packed)
    for block in range(packed.num_blocks):
        rules = packed.rules(block)
        assert [rule == "" for rule in rules] == (batch.segment_ids[block] == 0).tolist()
        for slot, target in enumerate(batch.targets[block].tolist()):
            assert (target != -100) == (
                slot + 1 < BLOCK
                and rules[slot + 1] == "completion"
                and batch.segment_ids[block, slot] == batch.segment_ids[block, slot + 1]
            )
