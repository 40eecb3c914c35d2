"""The native backend: FSDP2 over processes, eager or compiled layers, gradients by backward.

data x fsdp is HSDP: parameters are sharded over fsdp and repeated over data. Micro-batches are
summed locally, and only the last one's backward communicates. Each process updates its own shards;
loss, weight and norm are summed over processes, so that every process takes the same step.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.fsdp import FSDPModule

from torchprime.adapters.apply import saved
from torchprime.checkpoint.run.shards import TensorShards
from torchprime.config.sections.remat import RematConfig
from torchprime.data.blocks.batch import Batch
from torchprime.generation.decode import Answer, GenerateOptions
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.losses.divergence import chunked_divergence
from torchprime.losses.token_loss import CROSS_ENTROPY, TokenLoss
from torchprime.models.decoder import CausalLM
from torchprime.sharding import ShardingTable
from torchprime.torch_native import placement
from torchprime.torch_native.attention import (
    choose_kernel,
    find_flash,
    inject_attention,
    kernel_for_softcap,
)
from torchprime.torch_native.fused_loss import (
    ANY_KERNEL,
    Liger,
    LossRequest,
    choose_loss,
    find_liger,
    fused_cross_entropy,
    loss_for_softcap,
)
from torchprime.torch_native.generation import Generator
from torchprime.torch_native.mesh import data_rank, make_mesh
from torchprime.torch_native.placement import Source
from torchprime.torch_native.processes import make_processes
from torchprime.torch_native.remat import apply_remat, check_remat
from torchprime.torch_native.root import Root, on_counted_tokens
from torchprime.torch_native.runtime import OwnDevice, start_processes, watched
from torchprime.torch_native.state import StateMaker, averaged, state_shards, whole_shards
from torchprime.training.backend import ResumedState, StepNumbers, StepOptions
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.regularization.near_base import NearBase, base_of
from torchprime.training.regularization.penalty import AnchorSource
from torchprime.training.spikes import NAME, first_state
from torchprime.training.step import (
    CrossEntropy,
    StepSums,
    TrainState,
    Update,
    counted_weights,
    drawing,
    draws_of,
    eval_sums,
    finish_step,
    forward_sums,
    host_fields,
    inputs_of,
    micro_sums,
    step_numbers,
    sums_length,
    supervised_weight,
)

# Norms of the heads: of every process of the tensor axis only its own heads are used.
PER_HEAD = ("q_norm", "k_norm")
KEEP_ALL = RematConfig()


class NativeBackend(OwnDevice):
    """The implementation of `torchprime.training.backend.Backend` on torch.distributed."""

    name = "torch_native"

    def __init__(
        self,
        ici_mesh: Mapping[str, int],
        dcn_mesh: Mapping[str, int],
        *,
        attention_kernel: str = "auto",
        loss: LossRequest = ANY_KERNEL,
        remat: RematConfig = KEEP_ALL,
        full_precision: bool = False,
        compiler: str | None = None,
    ) -> None:
        """Make the backend.

        Args:
            compiler: torch.compile's backend for the layers; None is inductor on CUDA, none on CPU.
        """
        self.device = start_processes()
        self.mesh = make_mesh(ici_mesh, dcn_mesh, self.device.type)
        self.device_count = dist.get_world_size()
        self.processes = make_processes()
        cuda = self.device.type == "cuda"
        self.device_kind = torch.cuda.get_device_name(self.device) if cuda else "CPU"
        self.attention, self.attention_why = choose_kernel(
            attention_kernel,
            self.device.type,
            full_precision=full_precision,
            capability=torch.cuda.get_device_capability(self.device) if cuda else None,
            flash=find_flash(),
        )
        liger = find_liger() if cuda else Liger(None, "")
        self.loss, self.loss_why = choose_loss(loss, self.device.type, liger)
        self.liger_forward = liger.forward
        self.wanted = attention_kernel, loss
        check_remat(remat, self.device.type)
        self.remat = remat
        self.options = StepOptions()
        self.compiler = "inductor" if compiler is None and cuda else compiler
        if full_precision:
            torch.backends.cuda.matmul.allow_tf32 = False
        self.rank = data_rank(self.mesh)
        self.tensor_group = self.mesh["tensor"].get_group()

    # -- weights in and out --------------------------------------------------------------------

    def check(self, model: CausalLM, table: ShardingTable) -> None:
        """Check that the kernels can compute the model, and choose others if the config leaves the
        choice; that the tensor axis divides the attention heads and the linear layers it shards.

        The other axes divide anything: FSDP2 pads shards.

        Raises:
            ConfigError: they can't, or it does not.
        """
        a, (kernel, loss) = model.architecture, self.wanted
        self.attention, self.attention_why = kernel_for_softcap(
            kernel, (self.attention, self.attention_why), a.attention_softcap
        )
        self.loss, self.loss_why = loss_for_softcap(
            loss, (self.loss, self.loss_why), a.final_softcap
        )
        size = self.mesh["tensor"].size()
        if size > 1:
            placement.check_adapter(model, size)
            layer = model.model.layers.get_submodule("0")
            placement.tensor_styles(layer, model.architecture, table, size)

    def place(
        self,
        model: CausalLM,
        table: ShardingTable,
        tensor_of: Callable[[str], Tensor],
        dtype: torch.dtype,
        base: Callable[[str], Tensor] | None = None,
    ) -> None:
        """Inject kernels, torch.compile and remat, shard the model and load this process's shards.

        Each layer is sharded along tensor, if the table says so, and then along fsdp; data holds
        copies. The layers are compiled one by one, when they are first called.
        """
        self.model = model
        sources = [Source(model, tensor_of)]
        if base is not None:
            sources.append(Source(copy.deepcopy(model).requires_grad_(False), base))
        for each, _ in sources:
            inject_attention(each, self.attention, self.device.type)
            if self.compiler is not None:
                for layer in each.model.layers.children():
                    layer.compile(backend=self.compiler)
        self.root = Root(model, None if base is None else sources[1].model)
        placement.load(self.root, sources, table, self.mesh, dtype, self.device)
        for each, _ in sources:
            apply_remat(each.model.layers, self.remat, self.device.type)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Return an iterator over whole trained weights on the host, by their names in the model.

        Each is gathered on every process by a collective, which waits for the device.
        """
        self._reshard()
        return placement.gather(saved(self.model).items())

    def _reshard(self) -> None:
        """Reshard the root's own weights, which a forward leaves gathered. A tensor passed out
        could share their storage, which FSDP2 could then no longer free, and would not be a
        shard."""
        assert isinstance(self.root, FSDPModule)
        self.root.reshard()

    def save_sharded(self, folder: str) -> None:
        """Write this process's shards with torch.distributed.checkpoint, under the parameters'
        names, which are Hugging Face's."""
        state = {name: p.detach() for name, p in self.model.named_parameters()}
        save(state, storage_writer=FileSystemWriter(folder))

    # -- training ------------------------------------------------------------------------------

    def prepare_training(
        self,
        optimizer: Optimizer,
        options: StepOptions,
        resumed: ResumedState | None = None,
        anchors: AnchorSource | None = None,
    ) -> None:
        """Make the optimizer's state for this process's shards, in fp32 on the device.

        Of a checkpoint, only the regions of this process's shards are read.
        """
        self.optimizer, self.options = optimizer, options
        self.root.cross_entropy = self._cross_entropy(options.loss_chunks)
        self.root.training_loss = self._cross_entropy(options.loss_chunks, options.token_loss)
        base = self.root.base and dict(self.root.base.named_parameters())
        maker = StateMaker(optimizer, options, self.device, resumed, anchors, base)
        parameters = {name: maker.make(name, parameter) for name, parameter in self._trained()}
        counts = (0 if resumed is None else resumed.updates, 0)
        self.state = TrainState(
            parameters, *(torch.tensor(float(n), device=self.device) for n in counts)
        )
        if options.spikes is not None:
            state = first_state(options.spikes, resumed and resumed.spikes)
            self.state.spikes = state.to(self.device)
        self.copies = [placement.copies(p, self.mesh) for _, p in self._trained()]

    def _cross_entropy(self, chunks: int | None, kind: TokenLoss = CROSS_ENTROPY) -> CrossEntropy:
        if self.loss == "liger" and self.liger_forward is not None:
            return partial(fused_cross_entropy, kind=kind, liger_forward=self.liger_forward)
        return partial(chunked_cross_entropy, chunks=chunks, kind=kind)

    def _trained(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)

    def checkpoint_tensors(self) -> list[TensorShards]:
        """Return trained weights and optimizer state by their names in a checkpoint.

        Of the processes that hold the same shard, one lists it. Tensors are the training's own
        memory, not copies; nothing waits for the device before they are read.
        """
        self._reshard()
        found = [
            shards
            for name, parameter in saved(self.model).items()
            for shards in state_shards(
                name, parameter, self.state.parameters.get(name), self.optimizer, self.mesh
            )
        ]
        if self.state.spikes is not None:
            found.append(whole_shards(NAME, self.state.spikes, here=self.processes.index == 0))
        return found

    @watched
    def progress(self) -> tuple[int, int]:
        """Return the number of finished updates, and the first non-finite one (0 if none).

        Both are counted on the device, so this waits for it. They are the same on all processes.
        """
        return int(self.state.step), int(self.state.bad_step)

    def preempted(self, step: int) -> bool:
        """Return False: torch.distributed has no notice of a preemption."""
        return False

    def put(self, batch: Batch, accumulation: int) -> list[Tensor]:
        """Start copying this process's rows to its device, without waiting.

        Returns:
            The batch's fields [B, S], each as [A, b, S]: A micro-batches of b rows, where b is B
            divided by A and by the processes with different rows.
        """
        sent = []
        for field in host_fields(batch, self.options):
            whole = field.view(accumulation, self.rank.count, -1, field.shape[-1])
            sent.append(whole[:, self.rank.index].to(self.device, non_blocking=True))
        return sent

    @watched
    def train_step(self, batch: list[Tensor], lr: float) -> Tensor:
        """Start one update: forward and backward per micro-batch, then this process's shards.

        On CUDA it is queued without waiting for the device. Only the last micro-batch's backward
        reduces gradients over processes. Loss, weight and norm are summed over all of them.

        Returns:
            The step's numbers, one fp32 tensor on the device, the same on all processes.
        """
        root = self.root
        assert isinstance(root, FSDPModule)
        o = self.options
        sums = torch.zeros(sums_length(o), device=self.device)
        count = batch[0].shape[0]
        update = Update(self.state, self.optimizer, o)
        for index in range(count):
            fields = [field[index] for field in batch]
            root.set_requires_gradient_sync(index == count - 1)
            near = self._near_base(fields)
            with drawing(self.model, draws_of(update, fields)):
                loss = root(*fields, training=True, near=near)
                loss.loss_sum.backward()
            sums += micro_sums(loss, fields, o.num_sources)
        with torch.no_grad():
            totals = self._over_batch(torch.cat([sums, supervised_weight(batch)[None]]))
            numbers = finish_step(
                update,
                StepSums(totals[:-1], totals[-1], self._gradients()),
                # Filled on the device: a copy of a number from the host would wait for it.
                torch.full((), lr, dtype=torch.float32, device=self.device),
                gradient_scale=self.rank.count,  # from the mean to the sum
                over_shards=self._over_shards,
            )
        self.model.zero_grad(set_to_none=True)
        return numbers

    def _near_base(self, fields: Sequence[Tensor]) -> NearBase | None:
        """Run the base on a micro-batch, if the step has a divergence from it."""
        kl, chunks = self.options.kl, self.options.loss_chunks
        if kl is None:
            return None
        run = base_of(self.root.base or self.model, None)
        output = self.root(instead=partial(run, *inputs_of(fields)))
        divergence = partial(on_counted_tokens, partial(chunked_divergence, chunks=chunks))
        return NearBase(kl, divergence, output, counted_weights(fields, kl, self.options))

    def _gradients(self) -> list[Tensor]:
        """Return this process's shards of the gradients: the mean over processes, as FSDP2 leaves
        it."""
        gradients = []
        for name, parameter in self._trained():
            assert parameter.grad is not None
            gradient = placement.local(parameter.grad)
            if self.mesh["tensor"].size() > 1 and any(part in name for part in PER_HEAD):
                gradient = gradient.float()
                dist.all_reduce(gradient, group=self.tensor_group)
            gradients.append(gradient)
        return gradients

    def _over_shards(self, values: Iterable[Tensor]) -> Tensor:
        """Return the sum over all processes of scalars, one of each parameter's shard; a shard that
        several hold is counted once."""
        pairs = zip(values, self.copies, strict=True)
        total = torch.stack([value / copies for value, copies in pairs]).sum()
        dist.all_reduce(total)
        return total

    def _over_batch(self, values: Tensor) -> Tensor:
        """Return the sum over the processes with different rows. Those along tensor have the same
        rows."""
        values = values / self.mesh["tensor"].size()
        dist.all_reduce(values)
        return values

    @watched
    def read(self, handle: Tensor) -> StepNumbers:
        """Copy a step's numbers to the host, which waits for the device to finish that step."""
        return step_numbers(handle.tolist(), self.options)

    # -- looking -------------------------------------------------------------------------------

    @watched
    def eval_step(self, batch: list[Tensor], num_sources: int = 1) -> Tensor:
        """Start a forward pass of the batch's first micro-batch, without waiting for the device.

        Returns:
            Loss and weight sums over all processes, one fp32 tensor on the device.
        """
        with torch.no_grad():
            fields = [field[0] for field in batch]
            return self._over_batch(forward_sums(self.root(*fields), fields, num_sources))

    @watched
    def read_eval(self, handles: list[Tensor]) -> tuple[float, ...]:
        """Wait for several eval steps; return their sums, added on the host in double precision."""
        return eval_sums(handle.tolist() for handle in handles)

    @watched
    def logits(self, input_ids: list[int]) -> Tensor:
        """Return fp32 logits [S, V] of one sequence, on the host.

        Every process computes the same sequence: there is no batch to divide. The root's own
        weights are gathered for it and resharded after it.
        """
        ids = torch.tensor([input_ids], dtype=torch.int32, device=self.device)
        positions = torch.arange(len(input_ids), dtype=torch.int32, device=self.device)[None]
        root = self.root
        assert isinstance(root, FSDPModule)
        root.unshard()
        try:
            with torch.no_grad():
                return self.model.logits(ids, positions, torch.ones_like(ids)).cpu()[0]
        finally:
            root.reshard()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Put the moving averages in the place of the weights inside. A copy of this process's
        shards keeps the weights."""
        self._reshard()
        with averaged(self.state.parameters.values()):
            yield
            self._reshard()

    def generate(self, prompts: Sequence[Sequence[int]], options: GenerateOptions) -> list[Answer]:
        """Generate answers to prompts, in the prompts' order.

        Each process answers its rows of every batch; the answers are then exchanged on the hosts.
        Processes along the tensor axis have the same rows and compute their own heads.
        """
        generator = Generator(
            self.model,
            self.root,
            self.device,
            rank=self.rank,
            processes=self.processes,
            own_core=self.attention == "flash",
            compiled=self.compiler is not None,
        )
        mine = generator.generate(prompts, options)
        answers = {n: a for part in self.processes.gather(mine) for n, a in part.items()}
        return [answers[number] for number in range(len(prompts))]

    @watched
    def synchronize(self) -> None:
        """Wait until this process's GPU has finished all its work; a CPU has none pending."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def compiles(self) -> int:
        """Return the number of graphs that torch.compile made; none in eager mode."""
        if self.compiler is None:
            return 0
        counters: Any = torch._dynamo.utils.counters
        return int(counters["stats"]["unique_graphs"])
