"""The Protocol between the training loop and the machines it runs on.

A run uses a device only through these methods: weights and batches enter by `place`
and `put`, numbers and weights leave by `read` and `weights`. A backend is made from flat arguments
and never sees a config object.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from torchprime.checkpoint.run.shards import TensorShards
from torchprime.data.blocks.batch import Batch
from torchprime.generation.decode import Answer, GenerateOptions
from torchprime.losses.token_loss import CROSS_ENTROPY, TokenLoss
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.processes import Processes
from torchprime.training.regularization.near_base import Kl
from torchprime.training.regularization.penalty import AnchorSource, Penalty
from torchprime.training.spikes import Spike, SpikeOptions


@dataclass(frozen=True)
class StepNumbers:
    """The results of a train step, on the host.

    Attributes:
        loss: what the step minimizes, with all its terms.
        terms: named numbers besides it, by StepOptions.step_terms and loss_terms.
    """

    loss: float
    grad_norm: float
    weight_sum: float
    bad_step: int  # first update whose loss or gradient was not finite, 0 if none
    source_loss_sums: tuple[float, ...] = ()  # in nats, when several sources are mixed
    terms: dict[str, float] = field(default_factory=dict)
    spikes: tuple[Spike, ...] = ()  # among the last `SpikeOptions.ring` updates
    spikes_in_a_row: int = 0  # until this step


@dataclass(frozen=True)
class StepOptions:
    """The options of the compiled step besides model and optimizer.

    Attributes:
        token_loss: of training; held-out loss is always the cross-entropy.
        loss_terms: names of parts of the loss that every micro-batch sums (LossSums.terms).
        step_terms: names of numbers that an update computes once (`step.finish_step`).
        penalty: on the distance from the base's weights; its name is one of step_terms.
        kl: the divergence from the base's answers; its name is the last of loss_terms.
        random_seed: from -2^31 to 2^31 - 1, the key of dropout in adapters and of noise; None
            without both.
        noise_alpha: of NEFTune's noise on embeddings, which is drawn by `random_seed`; 0 for none.
    """

    gradient_accumulation_steps: int = 1
    loss_chunks: int | None = None  # of the sequence; None: by the bytes of a chunk's logits
    max_grad_norm: float | None = None
    max_grad_value: float | None = None
    master_weights: bool = True
    num_sources: int = 1  # several: the step also sums the loss by source
    token_loss: TokenLoss = CROSS_ENTROPY
    loss_terms: tuple[str, ...] = ()
    step_terms: tuple[str, ...] = ()
    penalty: Penalty | None = None
    kl: Kl | None = None
    random_seed: int | None = None
    noise_alpha: float = 0.0
    spikes: SpikeOptions | None = None


@dataclass(frozen=True)
class ResumedState:
    """An optimizer's state from a checkpoint: host tensors by the checkpoint's names.

    Attributes:
        tensor_of: gives a tensor, or the region of it with these (offsets, sizes).
        spikes: the state of `training/spikes.py`; None if the checkpoint has none.
    """

    tensor_of: Callable[..., Tensor]
    updates: int
    spikes: Tensor | None = None


class Backend(Protocol):
    """A kind of machine. `device` values are opaque to the loop."""

    name: str
    device_count: int
    device_kind: str
    processes: Processes
    attention: str  # the attention kernel in use
    attention_why: str  # and the reason for the choice
    loss: str  # the same for the cross-entropy
    loss_why: str

    def check(self, model: CausalLM, table: ShardingTable) -> None:
        """Check for errors that `place` would raise, before any weight is read.

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
        base: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Load the weights into the storage-less model, one tensor at a time, each directly into
        its shards. A tensor from `tensor_of` may become the model's own memory, which updates write
        to. Parameters that require no gradient are frozen: no step changes them.

        Args:
            tensor_of: by the parameters' names in the model.
            dtype: of the weights; parts of quantized ones keep their own.
            base: the weights of a frozen copy that steps with options.kl run; None for a run
                without it, and under an adapter, whose base is the model itself.
        """
        ...

    def prepare_training(
        self,
        optimizer: Optimizer,
        options: StepOptions,
        resumed: ResumedState | None = None,
        anchors: AnchorSource | None = None,
    ) -> None:
        """Make the optimizer's state of the trained parameters, sharded like them: zeros, or a
        checkpoint's.

        Args:
            anchors: the values that options.penalty needs. No step writes them, and no checkpoint
                holds them.
        """
        ...

    def put(self, batch: Batch, accumulation: int) -> Any:
        """Start moving a batch to the device; may be called from another thread."""
        ...

    def train_step(self, batch: Any, lr: float) -> Any:
        """Start one update; return a handle for `read` without waiting."""
        ...

    def read(self, handle: Any) -> StepNumbers:
        """Wait for a step and copy its numbers to the host."""
        ...

    def eval_step(self, batch: Any, num_sources: int = 1) -> Any:
        """Start a forward pass without update; return a handle for `read_eval`.

        Args:
            num_sources: of the rows the batch is from; with several, it sums the loss by source.
        """
        ...

    def read_eval(self, handles: list[Any]) -> tuple[float, ...]:
        """Return (loss sum, weight sum, then the loss sum by source) over several eval steps."""
        ...

    def averaged(self) -> AbstractContextManager[None]:
        """Return a context in which `eval_step`, `generate` and `logits` use the moving average of
        the trained weights (training/optim/ema.py); the weights themselves if the optimizer has
        none. At least one update was made, and none is made inside."""
        ...

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return the trained weights on the host, one at a time, by their names in the model, which
        are Hugging Face's; every process has to iterate over all of them."""
        ...

    def checkpoint_tensors(self) -> list[TensorShards]:
        """Return trained weights and optimizer state by their names in a checkpoint
        (checkpoint/run/shards.py), each with the shards that this process writes. Nothing is copied
        to the host before it is read, one tensor after the other in this order."""
        ...

    def progress(self) -> tuple[int, int]:
        """Return the number of finished updates, and the first whose loss or gradient was not
        finite (0 if none). This waits for the device."""
        ...

    def preempted(self, step: int) -> bool:
        """Return True when the runtime has announced a preemption, agreed by all processes for this
        step; False if the runtime never does."""
        ...

    def seed(self, seed: int) -> None:
        """Seed the device's random generator."""
        ...

    def rng_state(self) -> str:
        """Return the device's random state as text; "" if it has none of its own."""
        ...

    def set_rng_state(self, state: str) -> None:
        """Restore a state that `rng_state` returned."""
        ...

    def save_sharded(self, folder: str) -> None:
        """Write the weights in their shards (torch.distributed.checkpoint), under the backend's own
        names, without gathering or renaming."""
        ...

    def logits(self, input_ids: list[int]) -> Tensor:
        """Return fp32 [S, V] logits of one unpadded sequence, for checks; every process has to call
        it."""
        ...

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """Generate answers to prompts (token ids), greedily or sampled, and return them in the
        prompts' order.

        Every process calls it with the same prompts and gets all answers. Programs depend on the
        batch size and on the bucket of a prompt's length, not on the length itself. Weights, the
        optimizer's state and the programs of training stay as they are.

        Raises:
            DataError: a prompt that is empty or leaves no room in options.max_length.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device has finished all its work."""
        ...

    def start_profile(self, folder: str) -> None:
        """Start a trace that TensorBoard or xprof can read, written to the folder."""
        ...

    def stop_profile(self) -> None:
        """Stop the trace."""
        ...

    def compiles(self) -> int:
        """Return the number of graphs compiled so far in this process."""
        ...

    def device_memory_bytes(self) -> int | None:
        """Return the peak bytes in use on one device, if the runtime reports them."""
        ...
