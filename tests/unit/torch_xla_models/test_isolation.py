"""Segments of a block do not see each other: by loss against examples alone, and by the probe."""

from __future__ import annotations

import numpy as np
import pytest
import reference

from torchprime.config.sections.dataset import Packing
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.tokens.completions import Example
from torchprime.errors import IsolationError
from torchprime.models.attention import ReferenceAttention
from torchprime.training.setup.probe import probe_isolation

BLOCK = 16


def make_data(packing: Packing) -> PackedDataset:
    rng = np.random.default_rng(3)
    examples = []
    for n in range(24):
        length = int(rng.integers(3, 9))
        weights = (np.arange(length) >= 2) * rng.choice([0.5, 1.0, 2.0], length)
        ids = rng.integers(0, reference.V, length).astype(np.int32)
        rules = np.zeros(length, dtype=np.uint8)
        examples.append(Example(f"r:{n}", ids, weights.astype(np.float32), rules, "joint"))
    return PackedDataset.from_examples(examples, block_size=BLOCK, pad_id=0, packing=packing)


@pytest.fixture(scope="module")
def backend(make_backend):
    return make_backend({"fsdp": 2, "tensor": 2})


def mean_loss(backend, data: PackedDataset) -> float:
    size = reference.B
    sums = []
    for start in range(0, data.num_blocks, size):
        indices = np.full(size, -1)
        count = min(size, data.num_blocks - start)
        indices[:count] = np.arange(start, start + count)
        sums.append(backend.eval_step(backend.put(data.batch(indices), 1)))
    loss_sum, weight_sum = backend.read_eval(sums)
    return loss_sum / weight_sum


def test_packed_loss_is_that_of_the_examples_alone(backend) -> None:
    packed, alone = make_data("bfd"), make_data("none")
    assert packed.num_blocks < alone.num_blocks == 24
    assert mean_loss(backend, packed) == pytest.approx(mean_loss(backend, alone), rel=1e-5)


def test_the_probe_proves_isolation(backend) -> None:
    before = backend.compiles()
    said = probe_isolation(backend, make_data("bfd"), reference.B, reference.V)
    assert said.startswith("isolation    proved on 8 blocks")
    assert backend.compiles() - before <= 1, "the probe has one program, the held-out step's"


def test_nothing_to_prove_without_packing(backend) -> None:
    said = probe_isolation(backend, make_data("none"), reference.B, reference.V)
    assert "no block holds two segments" in said


def test_a_leaking_kernel_is_caught(make_backend, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = ReferenceAttention.prepare
    monkeypatch.setattr(
        ReferenceAttention, "prepare", lambda core, segments: honest(core, segments * 0 + 1)
    )
    backend = make_backend({"fsdp": 2, "tensor": 2})
    with pytest.raises(IsolationError, match="see each other: after changing one segment's"):
        probe_isolation(backend, make_data("bfd"), reference.B, reference.V)


def test_a_probe_that_cannot_fail_is_refused() -> None:
    class Deaf:
        """Its loss does not depend on the batch."""

        def put(self, batch, accumulation: int):
            return batch

        def eval_step(self, batch, num_sources: int = 1):
            return batch

        def read_eval(self, handles) -> tuple[float, float]:
            return 1.0, 1.0

    with pytest.raises(IsolationError, match="proves nothing"):
        probe_isolation(Deaf(), make_data("bfd"), reference.B, reference.V)
