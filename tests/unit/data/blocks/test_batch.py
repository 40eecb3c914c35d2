"""The counts of a batch, and a hash that only its content decides."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np
import pytest

from torchprime.data.blocks.batch import FIELDS, Batch

BATCH = Batch(
    input_ids=np.array([[5, 6, 7, 0], [8, 9, 0, 0]], np.int32),
    targets=np.array([[6, 7, -100, -100], [-100, 0, -100, -100]], np.int32),
    loss_weights=np.array([[1, 0.5, 0, 0], [0, 2, 0, 0]], np.float32),
    position_ids=np.array([[0, 1, 2, 0], [0, 1, 0, 0]], np.int32),
    segment_ids=np.array([[1, 1, 1, 0], [1, 1, 0, 0]], np.int32),
)


def test_counts_by_hand() -> None:
    assert (BATCH.slot_tokens, BATCH.real_tokens, BATCH.supervised_tokens) == (8, 5, 3)
    assert BATCH.weight_sum == 3.5
    assert list(BATCH.arrays()) == list(FIELDS)


def test_lengths_of_segments_in_each_block() -> None:
    segments = np.array([[1, 1, 2, 0], [1, 0, 0, 0]], np.int32)
    lengths = replace(BATCH, segment_ids=segments).segment_lengths()
    assert np.where(segments > 0, lengths, 0).tolist() == [[2, 2, 1, 0], [1, 0, 0, 0]]


def test_the_hash_is_sha256_of_names_types_shapes_and_bytes() -> None:
    content = b""
    for name in FIELDS:
        kind = "<f4" if name == "loss_weights" else "<i4"
        array = getattr(BATCH, name).astype(kind)
        content += f"{name}:{kind}:(2, 4);".encode() + array.tobytes()
    assert BATCH.hash() == hashlib.sha256(content).hexdigest()[:16]


@pytest.mark.parametrize("name", FIELDS)
def test_each_array_decides_the_hash_and_its_layout_does_not(name: str) -> None:
    array = getattr(BATCH, name)
    changed = array.copy()
    changed[1, 3] += 1
    assert replace(BATCH, **{name: changed}).hash() != BATCH.hash()
    swapped = array.astype(array.dtype.newbyteorder(">"))
    columns = np.asfortranarray(array)
    for same in (swapped, columns):
        assert replace(BATCH, **{name: same}).hash() == BATCH.hash()


def test_sources_are_no_part_of_the_hash_and_their_weights_add_up() -> None:
    sources = np.array([[0, 0, 0, 0], [2, 2, 0, 0]], np.int32)
    mixed = replace(BATCH, source_ids=sources)
    assert mixed.hash() == BATCH.hash()
    assert mixed.source_weights(4) == (1.5, 0.0, 2.0, 0.0)
    assert BATCH.source_weights(4) == ()
