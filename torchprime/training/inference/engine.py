"""The engines that answer prompts outside a run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

from torchprime.config.schema import TrainConfig
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.evaluation.behaviour import Generator
from torchprime.evaluation.heldout import HeldoutLoss, heldout_loss
from torchprime.training.backend import Backend
from torchprime.training.inference.placed import place_pretrained
from torchprime.training.processes import Processes
from torchprime.training.setup.inputs import RunInputs


class LossOf(Protocol):
    """Measures the loss on held-out rows; `batch_size` is the number of blocks per forward."""

    def __call__(self, data: PackedDataset, batch_size: int) -> HeldoutLoss: ...


@dataclass(frozen=True)
class Engine:
    """A model that is ready to answer.

    Attributes:
        processes: those that all call `generator` and `loss` with the same arguments.
        facts: what else the answers depend on, such as versions, for records.
    """

    name: str
    generator: Generator
    loss: LossOf
    processes: Processes
    facts: Mapping[str, object] = field(default_factory=dict)


# Called when config, rows and prompts are known to be right; reads the weights.
OpenEngine = Callable[[RunInputs], AbstractContextManager[Engine]]


@contextmanager
def on_backend(
    inputs: RunInputs, *, make_backend: Callable[[TrainConfig], Backend]
) -> Iterator[Engine]:
    """Place the model on a backend, and yield it as an engine."""
    backend = make_backend(inputs.config)
    place_pretrained(inputs, backend)
    facts = {"devices": f"{backend.device_count} x {backend.device_kind}"}
    loss = partial(heldout_loss, backend)
    yield Engine(backend.name, backend, loss, backend.processes, facts)
