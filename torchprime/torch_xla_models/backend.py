"""The XLA backend: one lazily traced, once compiled SPMD program per kind of step.

A step is traced by running it on lazy tensors, lowered, and executed from cache; the device runs
while the host traces the next. Values that change from step to step (batch, learning rate) enter as
data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch_xla.core.xla_model as xm
import torch_xla.debug.metrics as met
import torch_xla.debug.profiler as xp
import torch_xla.distributed.spmd as xs
import torch_xla.runtime as xr
from torch import Tensor, nn
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch_xla import _XLAC as XLAC  # pyright: ignore[reportPrivateImportUsage]
from torch_xla.experimental.distributed_checkpoint import SPMDSavePlanner

from torchprime.adapters.apply import saved, trainable
from torchprime.checkpoint.run.shards import TensorShards
from torchprime.config.sections.remat import RematConfig
from torchprime.data.blocks.batch import Batch
from torchprime.generation.decode import Answer, GenerateOptions
from torchprime.losses.chunks import Spread
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.models.decoder import CausalLM, put_barriers
from torchprime.sharding import ShardingTable
from torchprime.torch_xla_models import placement
from torchprime.torch_xla_models.attention import (
    KERNEL_MULTIPLE,
    check_attention,
    choose_kernel,
    inject_attention,
)
from torchprime.torch_xla_models.device_tensors import DeviceTensors
from torchprime.torch_xla_models.devices import (
    device_kind,
    keep_compiled,
    multiply_in_full_precision,
)
from torchprime.torch_xla_models.generation import Generator
from torchprime.torch_xla_models.layers.loops import device_loop
from torchprime.torch_xla_models.layers.remat import apply_remat
from torchprime.torch_xla_models.layers.runner import behind_barrier
from torchprime.torch_xla_models.layers.stages import gradient_of
from torchprime.torch_xla_models.linear import replace_linears, turned_spec
from torchprime.torch_xla_models.loss import choose_loss, loss_spread
from torchprime.torch_xla_models.mesh import axis_sizes, constrain, make_mesh
from torchprime.torch_xla_models.placement import StateMaker
from torchprime.torch_xla_models.processes import make_processes
from torchprime.torch_xla_models.runtime import check_loop_requirements
from torchprime.training.backend import ResumedState, StepNumbers, StepOptions
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.regularization.penalty import AnchorSource
from torchprime.training.spikes import NAME as SPIKES
from torchprime.training.spikes import first_state
from torchprime.training.step import (
    Micro,
    TrainState,
    Update,
    eval_sums,
    forward_sums,
    host_fields,
    loss_of,
    step_numbers,
    sums_length,
    train_step,
)


@dataclass(frozen=True)
class Kernels:
    """The kernels that a run asks for, by name, and the block size that they have to accept."""

    attention: str = "auto"
    loss: str = "auto"
    block_size: int = KERNEL_MULTIPLE


class XlaBackend:
    """The implementation of `torchprime.training.backend.Backend` on torch_xla SPMD."""

    name = "torch_xla"

    def __init__(
        self,
        ici_mesh: Mapping[str, int],
        dcn_mesh: Mapping[str, int],
        *,
        kernels: Kernels = Kernels(),
        remat: RematConfig | None = None,
        full_precision: bool = False,
        compile_cache: str | None = None,
        make_tensors: Callable[[xs.Mesh], DeviceTensors] = DeviceTensors,
    ) -> None:
        """Start SPMD over all devices of all hosts.

        Args:
            ici_mesh: sizes of the mesh's axes within a slice.
            dcn_mesh: the same across slices.
            full_precision: multiply fp32 in full precision on a TPU.
            compile_cache: folder for compiled programs, on a TPU; `auto` is the user's own.
            make_tensors: makes the tensors on the mesh; others than the default hold no data.

        Raises:
            ConfigError: the mesh does not fit the devices, a kernel is not for this device, or the
                cache's folder cannot be made.
        """
        if not xr.is_spmd():
            xr.use_spmd()
        keep_compiled(compile_cache)
        self.mesh = make_mesh(ici_mesh, dcn_mesh)
        self.tensors = make_tensors(self.mesh)
        self.device_count = xr.global_runtime_device_count()
        self.device_kind = device_kind()
        self.processes = make_processes()
        self.attention, self.attention_why = choose_kernel(kernels.attention, kernels.block_size)
        self.loss, self.loss_why = choose_loss(kernels.loss, xr.device_type() == "TPU")
        self.remat = remat or RematConfig()
        self.options = StepOptions()
        self._watches_preemption = False
        check_loop_requirements()
        if full_precision:
            multiply_in_full_precision()

    # -- weights in and out --------------------------------------------------------------------

    def check(self, model: CausalLM, table: ShardingTable) -> None:
        """Accept every model: the compiler can split any dim, also in the middle of a head."""

    def place(
        self,
        model: CausalLM,
        table: ShardingTable,
        tensor_of: Callable[[str], Tensor],
        dtype: torch.dtype,
        base: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Rewrite the storage-less model for this mesh and load its weights into their shards.

        Attention kernels, sharding constraints of activations, linear layers that take transposed
        weights, barriers, then scan and remat. Every process reads all tensors and sends its parts.
        """
        self.model, self.table = model, table
        self.batch_spec = ((), table.batch_axes(), ())
        inject_attention(model, self.attention, self.mesh, table.batch_axes())
        first = self.processes.index == 0
        check_attention(model, self.attention, dtype, self.tensors, quiet=not first)
        self._constrain_activations()
        replace_linears(
            model.model,
            self._gather_quantized,
            apart=not self.remat.scan_layers,
            gradient_of=partial(gradient_of, self.mesh, table),
        )
        if xr.device_type() == "TPU":
            put_barriers(model.model, behind_barrier)
        apply_remat(
            model,
            self.remat,
            shard_gradient=self._shard_layer_gradient,
            shard_output=self._shard_layer_output,
        )
        self.placed = placement.placements(model, table, self.mesh)
        placement.load(model, self.placed, tensor_of, dtype, self.tensors)
        self.base = base and dict(placement.sent(model, self.placed, base, dtype, self.tensors))
        self._generator: Generator | None = None  # made on first use

    def _constrain_activations(self) -> None:
        for name, module in self.model.named_modules():
            spec = self.table.find(self.table.activations, name) if name else None
            if spec is None:
                continue

            def hook(_: nn.Module, __: Any, out: Tensor, spec=spec) -> Tensor:
                return constrain(out, self.mesh, spec)

            module.register_forward_hook(hook)

    def _shard_layer_output(self, name: str, out: Tensor) -> Tensor:
        full = f"model.layers.0.{name}" if name else "model.layers.0"
        spec = self.table.find(self.table.activations, full)
        # A log-sum-exp has the dims of attention's result but the last.
        return out if spec is None else constrain(out, self.mesh, spec[: out.dim()])

    def _shard_layer_gradient(self, name: str, gradient: Tensor) -> Tensor:
        spec = self.table.find(self.table.parameters, f"model.layers.0.{name}")
        return gradient if spec is None else constrain(gradient, self.mesh, spec)

    def _gather_quantized(self, layer: str, part: str, tensor: Tensor) -> Tensor:
        """Annotate a part of a quantized weight as whole along the batch's axes.

        Left to itself, the partitioner would gather the dequantized weight, of several times the
        bytes.
        """
        spec = self.table.find(self.table.parameters, f"model.{layer}.{part}")
        assert spec is not None
        batch = self.table.batch_axes()
        whole = tuple(tuple(axis for axis in dim if axis not in batch) for dim in spec)
        # Times 1, which the compiler removes: a tensor that holds data keeps its own sharding.
        return constrain(tensor * 1, self.mesh, turned_spec(part, whole))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Wait for the device; return an iterator over whole trained weights on the host, by
        Hugging Face name.

        One process reads the shards of each. Several gather each by a program on the devices.
        """
        self.synchronize()  # the shards of a tensor that is still being computed can't be read
        return placement.gather(self.model, self.placed, self.processes.count)

    def save_sharded(self, folder: str) -> None:
        """Write the trained weights in their shards with torch.distributed.checkpoint, after
        waiting for the device. Scanned layers are written stacked."""
        self.synchronize()
        weights = {name: p.detach() for name, p in saved(self.model).items()}
        # Copying ahead needs a stream, which XLA devices do not have.
        writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        save(weights, storage_writer=writer, planner=SPMDSavePlanner(), no_dist=True)

    # -- training ------------------------------------------------------------------------------

    def prepare_training(
        self,
        optimizer: Optimizer,
        options: StepOptions,
        resumed: ResumedState | None = None,
        anchors: AnchorSource | None = None,
    ) -> None:
        """Make the optimizer's state before the first step, so that step 2 uses step 1's graph."""
        self.optimizer, self.options = optimizer, options
        master = options.master_weights
        maker = StateMaker(self.tensors, optimizer, master, resumed, anchors, self.base)
        parameters = {
            name: maker.make(name, weight, self.placed[name])
            for name, weight in trainable(self.model).items()
        }
        counts = (0 if resumed is None else resumed.updates, 0)
        step, bad_step = (self.tensors.send(torch.tensor(float(n)), ()) for n in counts)
        self.state = TrainState(parameters, step, bad_step)
        if options.spikes is not None:
            stored = None if resumed is None else resumed.spikes
            self.state.spikes = self.tensors.send(first_state(options.spikes, stored), ((),))
        self.tensors.materialize(self.state.tensors())

    def checkpoint_tensors(self) -> list[TensorShards]:
        """Return trained weights and optimizer state by their names in a checkpoint, with the
        shards on this process's devices, after waiting for them. Scanned layers are listed one by
        one."""
        self.synchronize()  # the shards of a tensor that is still being computed can't be read
        found = []
        for name, weight in saved(self.model).items():
            entry, state = self.placed[name], self.state.parameters.get(name)
            tensors = {"model": weight.detach()}
            if state is not None:  # it is trained
                tensors |= {f"optimizer.{slot}": tensor for slot, tensor in state.slots.items()}
                tensors |= {} if state.master is None else {"master": state.master}
            for prefix, tensor in tensors.items():
                names = [f"{prefix}.{hf_name}" for hf_name in entry.hf_names]
                found += placement.checkpoint_shards(tensor, names, entry.stacked)
        if self.state.spikes is not None:
            found += placement.checkpoint_shards(self.state.spikes, [SPIKES], stacked=False)
        return found

    def progress(self) -> tuple[int, int]:
        """Return the number of finished updates, and the first non-finite one (0 if none).

        Both are counted on the device, so this waits for it.
        """
        return int(self.state.step.item()), int(self.state.bad_step.item())

    def preempted(self, step: int) -> bool:
        """Return True when the TPU runtime has announced a preemption, on which all hosts agree."""
        if self.processes.count == 1 or xr.device_type() != "TPU":
            return False
        if not self._watches_preemption:
            XLAC._activate_preemption_sync_manager()
            self._watches_preemption = True
        return XLAC._sync_point_reached(step)

    def seed(self, seed: int) -> None:
        """Seed torch_xla's random generator, whose state is one number."""
        xm.set_rng_state(seed)

    def rng_state(self) -> str:
        """Return torch_xla's random state as text."""
        return str(xm.get_rng_state())

    def set_rng_state(self, state: str) -> None:
        """Restore a state that `rng_state` returned."""
        xm.set_rng_state(int(state))

    def _batch_shards(self) -> int:
        """Return the number of shards of a batch's rows."""
        sizes = axis_sizes(self.mesh)
        return math.prod(sizes[axis] for axis in self.table.batch_axes())

    def _spread(self) -> Spread:
        tied = self.model.lm_head is None
        name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return loss_spread(self.mesh, self.table.batch_axes(), self.placed[name].spec, self.loss)

    def put(self, batch: Batch, accumulation: int) -> list[Tensor]:
        """Start sending a batch to the devices, without waiting.

        Returns:
            The batch's fields [B, S], each as [A, B/A, S]: A micro-batches, whose rows are sharded
            along the table's batch axes.
        """
        host = [f.view(accumulation, -1, f.shape[-1]) for f in host_fields(batch, self.options)]
        return self.tensors.send_batch(host, self.batch_spec)

    def train_step(self, batch: list[Tensor], lr: float) -> Tensor:
        """Trace one update and start its program, without waiting for the device.

        The first call of a shape compiles it. The learning rate is data, not a constant.

        Returns:
            The step's numbers, one fp32 tensor on the device.
        """
        rate = self.tensors.send(torch.tensor(lr, dtype=torch.float32), ())
        update = Update(self.state, self.optimizer, self.options)
        numbers = train_step(
            update, self.model, tuple(batch), rate, self._accumulate, self._spread(), self.base
        )
        self.tensors.run([*self.state.tensors(), numbers])
        return numbers

    def _accumulate(
        self, micro: Micro, batch: tuple[Tensor, ...], weights: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]]:
        """Sum over micro-batches in a loop on the device, whose body is traced once."""
        specs = [self.placed[name].spec for name in self.state.parameters]

        def pinned(gradients: Sequence[Tensor]) -> list[Tensor]:
            pairs = zip(gradients, specs, strict=True)
            return [constrain(g, self.mesh, spec) for g, spec in pairs]

        if batch[0].shape[0] == 1:
            sums, gradients = micro(tuple(f[0] for f in batch), weights)
            return sums, pinned(gradients)

        count = len(weights)

        # The trained weights are passed through the loop. If the body read them from outside,
        # torch_xla would use another tensor of the same data, and the update could no longer write
        # over it. Nothing writes over frozen ones: they are read from outside.
        def body(carry: Sequence[Tensor], fields: Sequence[Tensor]):
            sums, totals, given = carry[0], carry[1 : 1 + count], carry[1 + count :]
            more, gradients = micro(tuple(fields), pinned(given))
            totals = [t + g.float() for t, g in zip(totals, gradients, strict=True)]
            return [sums + more, *pinned(totals), *given], []

        length = sums_length(self.options)
        zero = torch.zeros(length, dtype=torch.float32, device=weights[0].device)
        empty = [torch.zeros(w.shape, dtype=torch.float32, device=w.device) for w in weights]
        carry, _ = device_loop(body, [zero, *pinned(empty), *weights], batch)
        return carry[0], carry[1 : 1 + count]

    def read(self, handle: Tensor) -> StepNumbers:
        """Copy a step's numbers to the host, which waits for the device to finish that step."""
        return step_numbers(handle.cpu().tolist(), self.options)

    # -- looking -------------------------------------------------------------------------------

    def eval_step(self, batch: list[Tensor], num_sources: int = 1) -> Tensor:
        """Start a forward pass of the batch's first micro-batch, without waiting for the device.

        Returns:
            Loss and weight sums over all devices, one fp32 tensor on the device.
        """
        with torch.no_grad():
            fields = [f[0] for f in batch]
            cross_entropy = partial(
                chunked_cross_entropy, chunks=self.options.loss_chunks, spread=self._spread()
            )
            sums = forward_sums(loss_of(self.model, fields, cross_entropy), fields, num_sources)
        self.tensors.run([sums])
        return sums

    def read_eval(self, handles: list[Tensor]) -> tuple[float, ...]:
        """Wait for several eval steps; return their sums, added on the host in double precision."""
        return eval_sums(handle.cpu().tolist() for handle in handles)

    def logits(self, input_ids: list[int]) -> Tensor:
        """Return fp32 logits [S, V] of one sequence, on the host.

        The sequence is repeated to fill the batch axes of the mesh, and padded to a length that
        every attention kernel accepts.
        """
        rows = self._batch_shards()
        padding = -len(input_ids) % KERNEL_MULTIPLE
        ids = torch.tensor([*input_ids, *[0] * padding], dtype=torch.int32)
        positions = torch.arange(len(ids), dtype=torch.int32)
        segments = (positions < len(input_ids)).int()
        fields = [t.expand(rows, -1).contiguous() for t in (ids, positions, segments)]
        sent = self.tensors.send_batch(fields, self.batch_spec[1:])
        with torch.no_grad():
            out = self.model.logits(*sent)
        return out.cpu()[0, : len(input_ids)]

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Let the model read the moving averages inside: of fp32 weights the state's own tensors,
        of others a copy in their type. The weights' tensors stay the ones that a step writes to."""
        averages = placement.averages(self.state.parameters, self.placed, self.tensors)
        with placement.instead(self.model, averages):
            yield

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """Generate answers to prompts, in the prompts' order.

        Two programs per batch size and bucket, sharded like training's activations. Every process
        runs them for all prompts and reads all answers.
        """
        given = self.tensors, self.table, self.placed, self.attention
        self._generator = self._generator or Generator(self.model, *given)
        return self._generator.generate(prompts, options)

    def synchronize(self) -> None:
        """Wait until this process's devices have finished all programs and transfers."""
        xm.wait_device_ops()

    def start_profile(self, folder: str) -> None:
        """Start XLA's profiler, which traces host and devices, written to the folder."""
        xp.start_trace(folder)

    def stop_profile(self) -> None:
        """Stop the trace."""
        xp.stop_trace()

    def compiles(self) -> int:
        """Return the number of graphs compiled so far in this process."""
        data = met.metric_data("CompileTime")
        return 0 if data is None else int(data[0])

    def device_memory_bytes(self) -> int | None:
        """Return None: torch_xla 2.9 has no memory statistics for the virtual device of SPMD, nor a
        way to name a real one under it (both raise)."""
        return None
