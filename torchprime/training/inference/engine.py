"""The engines that answer prompts outside a run: a backend of ours, or vLLM."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.evaluation.behaviour import Generator
from torchprime.evaluation.heldout import HeldoutLoss, heldout_loss, loss_by_logprobs
from torchprime.generation.vllm_engine import OfflineVllm, ServedVllm
from torchprime.training.backend import Backend
from torchprime.training.inference.placed import place_pretrained
from torchprime.training.processes import OneProcess, Processes
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


@dataclass(frozen=True)
class VllmRequest:
    """The place of vLLM: the python of its environment, or a server.

    Attributes:
        name: the server's name of the model; None if it serves one.
        devices: that share each layer of the model; a server has its own number.
    """

    python: Path | None = None
    url: str | None = None
    name: str | None = None
    devices: int = 1


@contextmanager
def on_vllm(inputs: RunInputs, *, request: VllmRequest) -> Iterator[Engine]:
    """Load the model in vLLM, or ask the server that has it, and yield it as an engine.

    Raises:
        ConfigError: an adapter.
        RuntimeSetupError: vLLM fails, or the server does not answer.
    """
    _refuse_adapter(inputs)
    with ExitStack() as stack:
        if request.url is not None:
            vllm = ServedVllm(request.url, request.name)
        else:
            assert request.python is not None
            settings = {
                "model": str(inputs.files.folder),
                "dtype": inputs.config.torch_dtype,
                "tensor_parallel_size": request.devices,
            }
            vllm = stack.enter_context(OfflineVllm(request.python, settings))
        loss = partial(loss_by_logprobs, vllm.logprobs)
        yield Engine("vllm", vllm, loss, OneProcess(), {"engine_version": vllm.version})


def _refuse_adapter(inputs: RunInputs) -> None:
    """Refuse an adapter: vLLM 0.32 fails to score rows with one (an einsum of other sizes)."""
    adapter = inputs.files.adapter
    if adapter is not None and adapter.start is not None:
        refuse(
            "--engine",
            "vllm",
            "xla or native for an adapter, with which vLLM cannot score rows",
            f"Or merge it: torchprime export --adapter {adapter.start.folder} --merge --out NEW.",
        )


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
