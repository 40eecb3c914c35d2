"""The backend whose steps are one program per chip: training, held-out loss, checkpoints.

    tensors on the host -> client.send -> values on the chips -> program -> values -> client.read

Weights and state stay on the chips. A program is traced once for each shape of its inputs, and
compiled by the client. Everything here is the same on TPU chips and on their stand-in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from torchprime.adapters.apply import saved
from torchprime.attention_kernels.blocks import KERNEL_MULTIPLE
from torchprime.checkpoint.run.shards import TensorShards
from torchprime.config.sections.model import SPLASH
from torchprime.config.topologies import chip_in
from torchprime.data.blocks.batch import Batch
from torchprime.generation.decode import Answer, GenerateOptions
from torchprime.losses.chunks import CHUNK_BYTES, ChunkBytes, tpu_chunk_bytes
from torchprime.models.attention import ReferenceAttention
from torchprime.models.decoder import CausalLM, replace_attention_cores
from torchprime.sharding import ShardingTable
from torchprime.torch_native.chips import forward
from torchprime.torch_native.chips.client import Chips, Value
from torchprime.torch_native.chips.generation import Generator
from torchprime.torch_native.chips.programs import Programs
from torchprime.torch_native.chips.values import (
    Kept,
    checkpoint_shards,
    loaded,
    same_on_all,
    whole_tensors,
)
from torchprime.torch_native.tpu.kernels import KernelAttention
from torchprime.torch_native.tpu.layers import BASE
from torchprime.torch_native.tpu.parameters import check_tensor_axis, hold
from torchprime.torch_native.tpu.step import (
    FISHER,
    Input,
    Rows,
    StepBuilder,
    Training,
)
from torchprime.training.backend import ResumedState, StepNumbers, StepOptions
from torchprime.training.optim.ema import EMA
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.regularization.penalty import AnchorSource
from torchprime.training.spikes import NAME as SPIKES
from torchprime.training.spikes import first_state
from torchprime.training.step import eval_sums, host_fields, step_numbers


def chunk_bytes(kind: str) -> ChunkBytes:
    """Return the most bytes of a loss chunk's logits on a kind of devices."""
    chip = chip_in(kind)
    return CHUNK_BYTES if kind == "CPU" else tpu_chunk_bytes(chip and chip.hbm_bytes)


class ChipsBackend:
    """The implementation of `torchprime.training.backend.Backend` with one program per chip.

    Args:
        remat: layers run again in the backward, as one loop over equal layers.
        attention: the attention kernel, and the reason for the choice.
        loss: the same for the cross-entropy.
    """

    name = "torchtpu"

    def __init__(
        self,
        chips: Chips,
        *,
        remat: bool,
        attention: tuple[str, str],
        loss: tuple[str, str],
    ) -> None:
        self.chips = chips
        self.client, self.processes, self.grid = chips.client, chips.processes, chips.grid
        self.device_count, self.device_kind = self.grid.count, self.client.kind
        self.remat = remat
        self.attention, self.attention_why = attention
        self.loss, self.loss_why = loss
        self.options = StepOptions()
        self.programs = Programs(self.client)

    # -- weights in and out --------------------------------------------------------------------

    def check(self, model: CausalLM, table: ShardingTable) -> None:
        """Check that the grid can cut the model.

        Raises:
            ConfigError: it can't.
        """
        check_tensor_axis(model, self.grid)

    def place(
        self,
        model: CausalLM,
        table: ShardingTable,
        tensor_of: Callable[[str], Tensor],
        dtype: torch.dtype,
        base: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Replace the layers by ones that gather their weights, and send each chip its parts."""
        if self.attention == SPLASH:
            replace_attention_cores(model, KernelAttention)
        self.saved = set(saved(model))
        chunk = chunk_bytes(self.client.kind)
        self.parts = hold(model, table, self.grid, dtype, remat=self.remat, chunk_bytes=chunk)
        for held in self.parts.held:
            self.programs.values[f"model.{held.name}"] = loaded(self.client, held, tensor_of)
            if base is not None:
                self.programs.values[f"{BASE}.{held.name}"] = loaded(self.client, held, base)
        for name, buffer in self.parts.buffers.items():
            self.programs.values[name] = same_on_all(self.client, buffer)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator over whole trained weights on the host, by their names in the model.

        The processes exchange their parts of each on the hosts.
        """
        for kept in self._saved():
            value = self.programs.values[kept.name]
            yield from whole_tensors(self.client, self.processes, kept, value)

    def _saved(self) -> list[Kept]:
        """Return the parameters of checkpoints and exports."""
        return [Kept.weight(each) for each in self.parts.held if each.names[0] in self.saved]

    def save_sharded(self, folder: str) -> None:
        """Write the weights with torch.distributed.checkpoint, each whole, by the first process."""
        whole = dict(self.weights())
        if self.processes.index == 0:
            save(whole, storage_writer=FileSystemWriter(folder), no_dist=True)
        self.processes.gather(None)  # no process goes on before the files are there

    # -- training ------------------------------------------------------------------------------

    def prepare_training(
        self,
        optimizer: Optimizer,
        options: StepOptions,
        resumed: ResumedState | None = None,
        anchors: AnchorSource | None = None,
    ) -> None:
        """Make the optimizer's state on the chips. Of a checkpoint, only the regions of this
        process's chips are read.
        """
        self.options = options
        self.builder = StepBuilder(self.parts, Training(optimizer, options))
        self.state = [*self._state()]
        for kept in self.state:
            parts = [self._start_of(kept, rank, resumed) for rank in self.client.local]
            self.programs.values[kept.name] = self.client.send(parts)
        if anchors is not None:
            self._send_anchors(anchors)
        counts = {"step": 0 if resumed is None else resumed.updates, "bad_step": 0}
        for name, count in counts.items():
            self.programs.values[name] = same_on_all(self.client, torch.tensor(float(count)))
        if options.spikes is not None:
            state = first_state(options.spikes, resumed and resumed.spikes)
            self.programs.values["spikes"] = same_on_all(self.client, state)

    def _send_anchors(self, anchors: AnchorSource) -> None:
        """Send the values that a penalty needs; the base's are there already if a divergence needs
        them too."""
        values = self.programs.values
        for held in self.builder.with_base():
            if f"{BASE}.{held.name}" not in values:
                values[f"{BASE}.{held.name}"] = loaded(self.client, held, anchors.base)
        for held in self.builder.with_fisher():
            assert anchors.fisher is not None
            wide = replace(held, dtype=torch.float32)
            values[f"{FISHER}.{held.name}"] = loaded(self.client, wide, anchors.fisher)

    def _state(self) -> Iterator[Kept]:
        """Yield the tensors of the optimizer's state besides the weights."""
        for held in self.builder.trained:
            for slot, keeps in self.builder.training.optimizer.slots(held.info()).items():
                yield Kept(held, f"optimizer.{slot}", keeps, keeps.dtype)
            if self.builder.has_master(held):
                yield Kept.whole(held, "master", torch.float32)

    def _start_of(self, kept: Kept, rank: int, resumed: ResumedState | None) -> Tensor:
        """Return a chip's part of a state before the first step."""
        if resumed is not None:
            return kept.stored(resumed, rank)
        if kept.prefix != "master":
            return torch.zeros(kept.part, dtype=kept.dtype)
        weights = self.client.read(self.programs.values[f"model.{kept.held.name}"])
        return weights[list(self.client.local).index(rank)].float()

    def checkpoint_tensors(self) -> list[TensorShards]:
        """Return trained weights and optimizer state by their names in a checkpoint, with the
        regions of this process's chips. They are copied to the host when they are read."""
        found = []
        for kept in [*self._saved(), *self.state]:
            found += checkpoint_shards(self.client, kept, self.programs.values[kept.name])
        if self.options.spikes is not None:
            found.append(self._spike_shards())
        return found

    def _spike_shards(self) -> TensorShards:
        value, here = self.programs.values["spikes"], self.processes.index == 0
        shape = (self.options.spikes.length,) if self.options.spikes else ()
        chunks = [((0,), shape)] if here else []
        return TensorShards(
            SPIKES, shape, torch.float32, chunks, lambda: self.client.read(value)[: len(chunks)]
        )

    def progress(self) -> tuple[int, int]:
        """Return the number of finished updates, and the first non-finite one (0 if none).

        Both are counted on the chips, so this waits for them.
        """
        step, bad = (
            self.client.read(self.programs.values[name])[0] for name in ("step", "bad_step")
        )
        return int(step), int(bad)

    def preempted(self, step: int) -> bool:
        """Return False: TorchTPU has no notice of a preemption."""
        return False

    def put(self, batch: Batch, accumulation: int) -> list[Value]:
        """Start copying rows to this process's chips.

        Returns:
            The batch's fields [B, S]; a chip has each as [A, b, S]: A micro-batches of b rows.
        """
        sent = []
        for field in host_fields(batch, self.options):
            whole = field.view(accumulation, self.chips.row_groups, -1, field.shape[-1])
            rows = [whole[:, self.chips.row_group(rank)].contiguous() for rank in self.client.local]
            shape = tuple(rows[0].shape)
            sent.append(_Field(self.client.send(rows), shape, field.dtype))
        return sent

    def train_step(self, batch: list[_Field], lr: float) -> Value:
        """Start one update without waiting for the chips. The first call of a shape compiles it.

        Returns:
            The step's numbers, one fp32 tensor on each chip.
        """
        micro, count, sequence = batch[0].shape
        rows = Rows(micro, count, sequence, tuple(field.dtype for field in batch))
        rate = same_on_all(self.client, torch.tensor(lr, dtype=torch.float32))
        own = [rate, *(field.value for field in batch)]
        return self.programs.run(("step", rows), lambda: self.builder.build(rows), own)[0]

    def read(self, handle: Value) -> StepNumbers:
        """Copy a step's numbers to the host, which waits for the chips to finish that step."""
        return step_numbers(self.client.read(handle)[0].tolist(), self.options)

    # -- looking -------------------------------------------------------------------------------

    def eval_step(self, batch: list[_Field], num_sources: int = 1) -> Value:
        """Start a forward pass of the batch's first micro-batch, without waiting for the chips.

        Returns:
            Loss and weight sums over all chips, one fp32 tensor on each.
        """
        own = [Input(f"field.{n}", f.shape, f.dtype, False) for n, f in enumerate(batch)]
        chunks = self.options.loss_chunks
        function = forward.held_out_loss(self.parts, chunks, num_sources)
        key = ("eval", num_sources, batch[0].shape, len(batch))
        return self.programs.run(
            key, lambda: forward.build(self.parts, own, function), [f.value for f in batch]
        )[0]

    def read_eval(self, handles: list[Value]) -> tuple[float, ...]:
        """Wait for several eval steps; return their sums, added on the host in double precision."""
        return eval_sums(self.client.read(handle)[0].tolist() for handle in handles)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving averages in the place of the weights inside."""
        kept = dict(self.programs.values)
        for held in self.builder.trained:
            average = kept.get(f"optimizer.{EMA}.{held.name}")
            if average is not None:
                parts = [part.to(held.dtype) for part in self.client.read(average)]
                self.programs.values[f"model.{held.name}"] = self.client.send(parts)
        try:
            yield
        finally:
            self.programs.values = kept

    def logits(self, input_ids: list[int]) -> Tensor:
        """Return fp32 logits [S, V] of one sequence, on the host. For the kernel the sequence is
        padded, with tokens that come later and are not seen."""
        length = len(input_ids)
        padding = -length % KERNEL_MULTIPLE if self.attention == SPLASH else 0
        ids = torch.tensor([[*input_ids, *[0] * padding]], dtype=torch.int32)
        own = [Input("ids", tuple(ids.shape), ids.dtype, False)]
        function = forward.logits_of_one(self.parts)
        found = self.programs.run(
            ("logits", ids.shape[1]),
            lambda: forward.build(self.parts, own, function),
            [same_on_all(self.client, ids)],
        )
        return self.client.read(found[0])[0][:length]

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """Generate answers to prompts, in the prompts' order."""
        # Prompts have other lengths than the kernel's tiles.
        core = ReferenceAttention if self.attention == SPLASH else None
        generator = Generator(self.parts, self.chips, self.programs, core)
        return generator.generate(prompts, options)

    # -- the machine ---------------------------------------------------------------------------

    def seed(self, seed: int) -> None:
        """Do nothing: random numbers of a step are a function of its seed and place."""

    def rng_state(self) -> str:
        """Return "": the chips have no random state of their own."""
        return ""

    def set_rng_state(self, state: str) -> None:
        """Do nothing, as `seed`."""

    def synchronize(self) -> None:
        """Wait until this process's chips have finished all their work."""
        self.client.synchronize()

    def start_profile(self, folder: str) -> None:
        """Start the runtime's trace."""
        self.client.start_profile(folder)

    def stop_profile(self) -> None:
        """Stop the trace."""
        self.client.stop_profile()

    def compiles(self) -> int:
        """Return the number of programs compiled so far."""
        return len(self.programs)

    def device_memory_bytes(self) -> int | None:
        """Return the peak bytes in use on one chip, if the runtime reports them."""
        return self.client.memory_bytes()


@dataclass(frozen=True)
class _Field:
    """A batch's field on the chips, and the shape and type of a chip's part."""

    value: Value
    shape: tuple[int, ...]
    dtype: torch.dtype
