"""The isolation probe on the training step itself, with the attention kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from eager_chips import Chips, Each
from torch import Tensor
from torchtpu_case import VOCABULARY, make_case

from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.tokens.completions import Example
from torchprime.errors import IsolationError
from torchprime.models.decoder import replace_attention_cores
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.kernels import KernelAttention
from torchprime.torch_native.tpu.parameters import hold
from torchprime.torch_native.tpu.step import Rows, StepBuilder, Training, initial_values
from torchprime.training.setup.probe import probe_isolation
from torchprime.training.step import host_fields

BLOCK, ROWS = 128, 2


class OneStep:
    """The first training step of weights that stay as they are; its loss is the probe's."""

    def __init__(self) -> None:
        case = make_case({})
        replace_attention_cores(case.model, KernelAttention)
        parts = hold(case.model, case.table, Grid(), torch.float32, remat=True)
        self.options, self.start_of = replace(case.options, num_sources=1), case.start.__getitem__
        self.builder = StepBuilder(parts, Training(case.optimizer, self.options))
        kinds = (torch.int32, torch.int32, torch.float32, torch.int32, torch.int32)
        self.step = self.builder.build(Rows(1, ROWS, BLOCK, kinds))

    def put(self, batch: Batch, accumulation: int) -> list[Tensor]:
        return [field[None] for field in host_fields(batch, self.options)]

    def eval_step(self, batch: list[Tensor], num_sources: int = 1) -> float:
        buffers = self.builder.buffers
        state = [value for _, value in initial_values(self.step, 0, self.start_of, buffers)]
        given = [*state, torch.tensor(0.0), *batch]
        with torch.no_grad():
            found = Chips(self.step.graph, Grid()).run(*(Each([each]) for each in given))
        return float(found[0].values[0][0])

    def read_eval(self, handles: Sequence[float]) -> tuple[float, ...]:
        return tuple(handles)


@pytest.fixture(scope="module")
def data() -> PackedDataset:
    rng = np.random.default_rng(3)
    examples = []
    for n in range(9):
        ids = rng.integers(1, VOCABULARY, int(rng.integers(20, 60))).astype(np.int32)
        weights, rules = np.ones(len(ids), dtype=np.float32), np.zeros(len(ids), dtype=np.uint8)
        examples.append(Example(f"r:{n}", ids, weights, rules, "joint"))
    return PackedDataset.from_examples(examples, block_size=BLOCK, pad_id=0, packing="bfd")


def test_the_training_step_keeps_segments_apart(data: PackedDataset) -> None:
    said = probe_isolation(OneStep(), data, ROWS, VOCABULARY)
    assert said.startswith(f"isolation    proved on {ROWS} blocks")


def test_a_core_that_forgets_segments_is_caught(
    data: PackedDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = KernelAttention.prepare
    monkeypatch.setattr(
        KernelAttention, "prepare", lambda core, segments: honest(core, segments * 0 + 1)
    )
    with pytest.raises(IsolationError, match="see each other: after changing one segment's"):
        probe_isolation(OneStep(), data, ROWS, VOCABULARY)
