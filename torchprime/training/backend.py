"""The seam between the one loop and the machines it runs on.

Everything a run does on a device goes through these methods: weights and batches enter by `place`
and `put`, numbers and weights leave by `read` and `weights`. A backend is made from flat arguments
and never sees a config object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from torchprime.checkpoint.run.shards import TensorShards
from torchprime.data.blocks.batch import Batch
from torchprime.generation.decode import Answer, GenerateOptions
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable
from torchprime.training.optim import Optimizer


@dataclass(frozen=True)
class StepNumbers:
    """What a train step computed, on the host."""

    loss: float
    grad_norm: float
    weight_sum: float
    bad_step: int  # first update whose loss or gradient was not finite, 0 if none
    source_loss_sums: tuple[float, ...] = ()  # in nats, when several sources are mixed


@dataclass(frozen=True)
class StepOptions:
    """What shapes the compiled step besides model and optimizer."""

    gradient_accumulation_steps: int = 1
    loss_chunks: int = 8
    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    master_weights: bool = True
    num_sources: int = 1  # several: the step also sums the loss by source


@dataclass(frozen=True)
class ResumedState:
    """An optimizer's state from a checkpoint: host tensors by the checkpoint's names.

    Attributes:
        tensor_of: gives a tensor, or the region of it with these (offsets, sizes).
    """

    tensor_of: Callable[..., Tensor]
    updates: int


class Backend(Protocol):
    """One kind of machine. `device` values are opaque to the loop."""

    name: str
    device_count: int
    device_kind: str
    process_index: int
    process_count: int
    attention: str  # the attention kernel in use
    attention_why: str  # and why it is that one
    loss: str  # the same for the cross-entropy
    loss_why: str

    def check(self, model: CausalLM, table: ShardingTable) -> None:
        """Find what `place` would refuse, before any weight is read.

        Raises:
            ConfigError: a model whose layers this kind of machine cannot cut as its mesh is.
        """
        ...

    def place(
        self,
        model: CausalLM,
        table: ShardingTable,
        tensor_of: Callable[[str], Tensor],
        dtype: torch.dtype,
    ) -> None:
        """Give the storage-less model its weights, one tensor at a time, each to its shards. What
        `tensor_of` returns may become the model's own memory, which updates write to."""
        ...

    def prepare_training(
        self, optimizer: Optimizer, options: StepOptions, resumed: ResumedState | None = None
    ) -> None:
        """Make the optimizer's state, sharded like its parameters: zeros, or a checkpoint's."""
        ...

    def put(self, batch: Batch, accumulation: int) -> Any:
        """Start moving a batch to the device; may be called from another thread."""
        ...

    def train_step(self, batch: Any, lr: float) -> Any:
        """Start one update; returns a handle for `read` without waiting."""
        ...

    def read(self, handle: Any) -> StepNumbers:
        """Wait for a step and bring its numbers to the host."""
        ...

    def eval_step(self, batch: Any, num_sources: int = 1) -> Any:
        """Start a forward without update; returns a handle for `read_eval`.

        Args:
            num_sources: of the rows the batch is from; with several, it sums the loss by source.
        """
        ...

    def read_eval(self, handles: list[Any]) -> tuple[float, ...]:
        """(loss sum, weight sum, then the loss sum by source) over several eval steps."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return the weights on the host, one at a time, by Hugging Face name; every process has to
        go through all of them."""
        ...

    def checkpoint_tensors(self) -> list[TensorShards]:
        """Weights and optimizer state as a checkpoint names them (checkpoint/run/shards.py), each
        with the shards that this process writes. Nothing moves to the host before they are read,
        one after the other in this order."""
        ...

    def progress(self) -> tuple[int, int]:
        """Updates done, and the first whose loss or gradient was not finite, 0 if none. Waits."""
        ...

    def gather_objects(self, value: Any, *, aside: bool = False) -> list[Any]:
        """What each process gave, in the order of processes, on every process.

        Args:
            aside: for a thread that runs beside the loop: what it exchanges is never taken for
                what the loop exchanges meanwhile. One thread at a time.
        """
        ...

    def largest(self, value: int) -> int:
        """Return the largest of what each process gives; all of them must call it."""
        ...

    def preempted(self, step: int) -> bool:
        """Return True if the machine is about to be taken away, as its runtime says and all
        processes have agreed for this step; False where the runtime says nothing."""
        ...

    def seed(self, seed: int) -> None:
        """Begin the device's random numbers."""
        ...

    def rng_state(self) -> str:
        """Return the device's random state as text, "" where it has none of its own."""
        ...

    def set_rng_state(self, state: str) -> None:
        """Give back what `rng_state` gave."""
        ...

    def save_sharded(self, folder: str) -> None:
        """Write the weights as they lie on the devices (torch.distributed.checkpoint), under the
        backend's own names, without gathering or renaming anything."""
        ...

    def logits(self, input_ids: list[int]) -> Tensor:
        """fp32 [S, V] logits of one unpadded sequence, for checks; every process has to call it."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """Answer prompts (token ids), greedily or sampled; the answers in the prompts' order.

        Every process calls it with the same prompts and gets all answers. Programs depend on the
        batch size and on the bucket of a prompt's length, not on the length itself. Weights, the
        optimizer's state and the programs of training stay as they are.

        Raises:
            DataError: a prompt that is empty or leaves no room in options.max_length.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all it was given."""
        ...

    def start_profile(self, folder: str) -> None:
        """Begin a trace that TensorBoard or xprof can read, written to the folder."""
        ...

    def stop_profile(self) -> None:
        """End it."""
        ...

    def compiles(self) -> int:
        """How many graphs have been compiled so far in this process."""
        ...

    def device_memory_bytes(self) -> int | None:
        """Peak bytes in use on one device, where the runtime tells."""
        ...
