"""The diagonal Fisher information of a base, from the gradient of each example alone.

    F = sum over examples n of (dL_n/dw)^2, divided by the sum over n of W_n

L_n is the summed loss of the example's supervised tokens and W_n the sum of their weights. This is
the empirical Fisher information: of the labels in the rows, not of samples from the model. With the
division, half of sum F (w - w0)^2 estimates how much the mean loss per supervised token of these
rows rises.

An example is alone in an update over the whole mesh: the other rows are empty. So the gradient,
which devices sum over their rows, is that of one example, and is squared after that. The square of
a batch's gradient would be another number. The cost is one update per example, of which devices
along the axes data and fsdp share the memory but not the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchprime.checkpoint.fisher import FisherFacts, write_fisher
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.room import Need, require_room
from torchprime.checkpoint.run.shards import TensorShards
from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.loss import LossConfig
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.order import EMPTY_BLOCK, batch_indices
from torchprime.data.blocks.pack import pack
from torchprime.errors import DivergedError
from torchprime.training.backend import Backend
from torchprime.training.inference.placed import place_pretrained, read_inputs
from torchprime.training.optim.optimizer import Parameter, Slot

SQUARES = "squares"
REPORT_EVERY = 100  # examples between two lines for the user


class SquaredGradients:
    """An optimizer that leaves the weights as they are and sums squared gradients.

    The gradient that it gets is that of the mean loss per supervised weight. Times the learning
    rate, which is the batch's weight here, it is that of the summed loss.
    """

    weight_decay = 0.0

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        return {SQUARES: Slot(parameter.dims)}

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        return {"weight": weight, SQUARES: state[SQUARES] + (gradient * lr).pow(2)}


@dataclass(frozen=True)
class FisherRequest:
    """The folder to write, and the number of examples to use; all if there are fewer."""

    out: Path
    examples: int


def measure_fisher(
    config: TrainConfig,
    make_backend: Callable[[TrainConfig], Backend],
    request: FisherRequest,
    say: Callable[[str], None],
) -> FisherFacts:
    """Compute the Fisher information of the config's base on its training rows, and write it.

    Args:
        say: prints a line for the user; called on the first process only.

    Raises:
        ConfigError: a config without base, or with an adapter.
        DivergedError: an example whose loss or gradient is not finite.
    """
    _check(config)
    # Fisher information is of the log-likelihood, whatever a run minimizes.
    config = replace(config, task=replace(config.task, loss=LossConfig()))
    inputs = read_inputs(config, say)
    files = inputs.files
    layout = WeightLayout(files.shapes, torch.float32, int(config.task.max_shard_size_gb * 1e9))
    backend = make_backend(inputs.config)
    backend.processes.first_does(partial(_require_place, request.out, layout))
    base = backend.processes.first_does(files.base_fingerprint)
    place_pretrained(inputs, backend, SquaredGradients())
    data = one_by_one(inputs.rows.train)
    count = min(request.examples, data.num_blocks)
    say(f"Fisher information of {count:,} examples out of {data.num_blocks:,}")
    weight = sum_squares(backend, data, count, config, say)
    facts = FisherFacts(base, inputs.rows.train.fingerprint(), count, weight)
    values = ((name, each / weight) for name, each in gathered(backend))
    try:
        if backend.processes.index == 0:
            write_fisher(request.out, values, layout, facts)
    finally:
        for _ in values:  # the rest of this process's part in gathering them
            pass
    say(f"wrote {request.out}: {weight:,.0f} supervised weight in {count:,} examples")
    return facts


def _check(config: TrainConfig) -> None:
    if config.model.pretrained_model is None:
        refuse("model.pretrained_model", None, "the base to measure", "Name a checkpoint.")
    if config.adapter.enabled:
        refuse(
            "adapter.rank",
            config.adapter.rank,
            "null: the Fisher information is of the base's weights, which an adapter freezes",
            "Set adapter=none.",
        )


def _require_place(out: Path, layout: WeightLayout) -> None:
    """Check now that the folder can be written."""
    ExportPlace.of(out).require_new()
    require_room([Need("the Fisher information", out, layout.num_bytes + 1_000_000, 8, "--out")])


def one_by_one(data: PackedDataset) -> PackedDataset:
    """Return the same examples with each in a block of its own; one that is longer than a block
    becomes several."""
    examples = np.unique(data.plan.examples)
    plan = pack(data.store.lengths, data.block_size, "none", examples)
    return PackedDataset(data.store, plan, block_size=data.block_size, pad_id=data.pad_id)


def sum_squares(
    backend: Backend,
    data: PackedDataset,
    count: int,
    config: TrainConfig,
    say: Callable[[str], None],
) -> float:
    """Run one update for each of the first `count` examples in the seed's order; return the sum of
    their weights."""
    mesh = config.mesh_shape()
    indices = np.full(mesh["data"] * mesh["fsdp"], EMPTY_BLOCK, dtype=np.int64)
    total = 0.0
    for number in range(count):
        indices[0] = batch_indices(data.num_blocks, config.seed, number, 1)[0]
        batch = data.batch(indices)
        handle = backend.train_step(backend.put(batch, 1), batch.weight_sum)
        total += batch.weight_sum
        if (number + 1) % REPORT_EVERY == 0 or number + 1 == count:
            bad = backend.read(handle).bad_step
            if bad:
                raise DivergedError(
                    f"the loss or gradient of example {bad} of {count} is not finite; nothing was "
                    "written. Look for NaN or infinite weights in the base (torchprime verify)."
                )
            say(f"example {number + 1:,} of {count:,}")
    if not total:
        refuse(
            "dataset",
            f"{count} examples without a supervised token",
            "some supervised tokens",
            "Take more examples (--examples), or other rows.",
        )
    return total


def gathered(backend: Backend) -> Iterator[tuple[str, Tensor]]:
    """Yield the sums of squares on the host, whole, one at a time, by the weights' names; every
    process has to take all of them."""
    prefix = f"optimizer.{SQUARES}."
    for shards in backend.checkpoint_tensors():
        if shards.name.startswith(prefix):
            yield shards.name.removeprefix(prefix), _whole(shards, backend.processes.gather)


def _whole(shards: TensorShards, gather: Callable[[object], Sequence[object]]) -> Tensor:
    """Return a tensor from the regions of all processes."""
    mine = [
        (offsets, values.cpu())
        for (offsets, _), values in zip(shards.chunks, shards.read(), strict=True)
    ]
    whole = torch.empty(shards.shape, dtype=torch.float32)
    for parts in gather(mine):
        for offsets, values in parts:  # type: ignore[attr-defined]
            cut = zip(offsets, values.shape, strict=True)
            whole[tuple(slice(at, at + size) for at, size in cut)] = values
    return whole
