"""The plan of a run in numbers, before it starts: steps, tokens per update, bytes per device."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from torchprime.adapters.apply import saved
from torchprime.config.schema import TrainConfig
from torchprime.config.topologies import GIB, topology
from torchprime.data.blocks.budget import Budget, Spread, batch_budget
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.blocks.order import steps_per_epoch
from torchprime.data.blocks.replay import ReplayOrder, ReplayPlan, ReplaySchedule
from torchprime.errors import ConfigError
from torchprime.losses.chunks import chunks_for, tpu_chunk_bytes
from torchprime.metrics.throughput import ModelSizes, model_flops_per_token
from torchprime.models.architecture import Architecture
from torchprime.models.decoder import CausalLM
from torchprime.sharding import Spec, shard_count
from torchprime.training.loop import DataOrder
from torchprime.training.optim.optimizer import Optimizer, Parameter
from torchprime.training.setup.activations import Shape as BatchShape
from torchprime.training.setup.activations import kept_bytes
from torchprime.training.setup.adapter import ModelForm

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device.

    Weights, master copies, optimizer state and gradients follow from shapes and sharding.
    Activations are what the backward pass needs: under remat the tensors of a layer that stay on
    the device, such as its input, otherwise all that autograd keeps, as `activations.py` counts
    it; plus one chunk of logits with its gradient.
    """

    weights: int  # that are trained
    optimizer: int
    gradients: int
    activations: int
    frozen: int = 0  # weights that an adapter leaves as they are
    reference: int = 0  # the base's weights and Fisher information, for regularization

    @property
    def total(self) -> int:
        held = self.weights + self.frozen + self.reference
        return held + self.optimizer + self.gradients + self.activations


class StoredParameter(NamedTuple):
    """A parameter as a device stores it."""

    shape: Shape
    dtype: torch.dtype
    trained: bool
    saved: bool = True  # it is part of checkpoints

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def stored_parameters(model: nn.Module) -> dict[str, StoredParameter]:
    """Return the parameters of a model, which may be without storage, by name."""
    in_checkpoints = saved(model)
    return {
        name: StoredParameter(tuple(p.shape), p.dtype, p.requires_grad, name in in_checkpoints)
        for name, p in model.named_parameters()
    }


class ParameterCounts(NamedTuple):
    """Counts of a model's parameters."""

    trained: int
    frozen: int  # before their quantization

    @property
    def total(self) -> int:
        return self.trained + self.frozen


def count_parameters(
    stored: Mapping[str, StoredParameter], base_shapes: Mapping[str, Shape]
) -> ParameterCounts:
    """Count trained and frozen parameters.

    Args:
        base_shapes: of the weights without an adapter and unquantized.
    """
    trained = {name: p.size for name, p in stored.items() if p.trained}
    frozen = sum(math.prod(s) for name, s in base_shapes.items() if name not in trained)
    return ParameterCounts(sum(trained.values()), frozen)


def estimate_memory(
    config: TrainConfig,
    form: ModelForm,
    stored: Mapping[str, StoredParameter],
    specs: Mapping[str, Spec],
    optimizer: Optimizer,
) -> Memory:
    """Return the estimated share of one device of the config's mesh.

    Args:
        stored: the parameters, and `specs` their sharding, by name.
    """
    held = held_memory(config, stored, specs, optimizer)
    return replace(held, activations=_activation_bytes(config, form))


def held_memory(
    config: TrainConfig,
    stored: Mapping[str, StoredParameter],
    specs: Mapping[str, Spec],
    optimizer: Optimizer,
) -> Memory:
    """Return a device's share of all that is there at every step, without activations."""
    mesh, dtype = config.mesh_shape(), getattr(torch, config.torch_dtype)
    trained = {name: p for name, p in stored.items() if p.trained}
    weights, state = _trained_bytes(config, trained, specs, optimizer)
    # Summed in fp32 when there are several micro-batches, in the weights' type otherwise.
    summed = 4 if config.task.gradient_accumulation_steps > 1 else dtype.itemsize
    return Memory(
        weights=weights,
        optimizer=state,
        gradients=weights // dtype.itemsize * summed,
        activations=0,
        frozen=sum(
            p.size // shard_count(specs[name], mesh) * p.dtype.itemsize
            for name, p in stored.items()
            if not p.trained
        ),
        reference=weights // dtype.itemsize * reference_bytes(config),
    )


def reference_bytes(config: TrainConfig) -> int:
    """Return the bytes of frozen values beside each trained one, for regularization."""
    held, dtype = config.regularization, getattr(torch, config.torch_dtype)
    fisher = 4 if held.ewc.strength is not None else 0
    return dtype.itemsize * held.holds_base(adapter=config.adapter.enabled) + fisher


def _trained_bytes(
    config: TrainConfig,
    trained: Mapping[str, StoredParameter],
    specs: Mapping[str, Spec],
    optimizer: Optimizer,
) -> tuple[int, int]:
    """Return one device's bytes of weights, and of the optimizer's state with master copies."""
    mesh = config.mesh_shape()
    weights = state = 0
    for name, p in trained.items():
        spec = specs[name]
        share = p.size // shard_count(spec, mesh)
        weights += share * p.dtype.itemsize
        facts = Parameter((name,), p.shape, p.dtype)
        for slot in optimizer.slots(facts).values():
            kept = tuple(spec[d] for d in slot.dims)
            elements = math.prod(slot.kept(p.shape))
            state += elements // shard_count(kept, mesh) * slot.dtype.itemsize
        if p.dtype.itemsize < 4 and config.task.optimizer.master_weights:
            state += share * 4
    return weights, state


def _activation_bytes(config: TrainConfig, form: ModelForm) -> int:
    c, a, mesh = config, form.architecture, config.mesh_shape()
    rows = max(1, c.task.micro_batch_size // (mesh["data"] * mesh["fsdp"]))
    tokens = rows * c.dataset.block_size
    dtype: torch.dtype = getattr(torch, c.torch_dtype)
    logits = loss_bytes(c, form.with_layers(1).build(dtype), rows)
    if c.remat.selects:
        layer = tokens * kept_elements(a, c.remat.saved) * dtype.itemsize
        return layer * a.num_hidden_layers + logits
    shape = BatchShape(rows, c.dataset.block_size, c.task.loss_chunks)
    kept = kept_bytes(
        lambda layers: form.with_layers(layers).build(dtype),
        a.num_hidden_layers,
        shape,
        core="kernel",
        names=None,
    )
    return kept + logits


def loss_chunk(config: TrainConfig, model: CausalLM, rows: int, memory: int | None = None) -> int:
    """Return the tokens of a row whose logits exist at a time, at most: on TPUs.

    Args:
        model: without storage.
        rows: of a micro-batch on one device.
        memory: of a chip; None is that of `compile_only`, if it is set.
    """
    size = config.dataset.block_size
    chunks = config.task.loss_chunks
    if chunks is None:
        slice_ = None if config.compile_only is None else topology(config.compile_only)
        most = tpu_chunk_bytes(memory or (slice_ and slice_.chip.hbm_bytes))
        output = model.output_weight
        limit = most.of(trained=output.requires_grad)
        chunks = chunks_for(rows, size, output.shape[0], limit)
    return math.ceil(size / chunks)


def loss_bytes(config: TrainConfig, model: CausalLM, rows: int, memory: int | None = None) -> int:
    """Return the bytes of logits and their gradients at the loss's fullest moment: on TPUs, before
    a tensor axis cuts them.

    A compiled loss keeps logits in the weights' type. With several chunks and a trained output
    weight it also keeps the gradients by the logits of all chunks, and the weight's in fp32.
    """
    output = model.output_weight
    length = loss_chunk(config, model, rows, memory)
    chunk, whole = (
        rows * tokens * output.shape[0] for tokens in (length, config.dataset.block_size)
    )
    held = 2 * chunk * output.dtype.itemsize
    if chunk < whole and output.requires_grad:
        held = (chunk + whole) * output.dtype.itemsize + 4 * output.numel()
    models = 1 if config.regularization.kl.coefficient is None else 2  # with logits of their own
    return models * held


def kept_elements(a: Architecture, names: Iterable[str]) -> int:
    """Return the elements that a layer keeps for a token, by the names that remat has for them.

    A fused projection is kept whole. A kernel's log-sum-exp is small and left out.
    """
    wide, narrow = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    sizes = {
        "layer_input": a.hidden_size,
        "q": wide,
        "k": narrow,
        "v": narrow,
        "core_out": wide,
        "attn_out": a.hidden_size,
        "gate": a.intermediate_size,
        "up": a.intermediate_size,
    }
    fused = ({"q", "k", "v"} if a.fused_qkv else set(), {"gate", "up"} if a.fused_mlp else set())
    kept = set(names)
    for together in fused:
        kept |= together if kept & together else set()
    return sum(sizes[name] for name in kept)


def checkpoint_bytes(
    config: TrainConfig, stored: Mapping[str, StoredParameter], optimizer: Optimizer
) -> int:
    """Return the size of a checkpoint's tensors: saved weights, master copies and the optimizer's
    state."""
    trained = {name: p for name, p in stored.items() if p.trained}
    whole: dict[str, Spec] = {name: ((),) * len(p.shape) for name, p in trained.items()}
    frozen = [p for p in stored.values() if p.saved and not p.trained]
    more = sum(p.size * p.dtype.itemsize for p in frozen)
    return sum(_trained_bytes(config, trained, whole, optimizer)) + more


@dataclass(frozen=True)
class Plan:
    """Everything known before the first step."""

    total_steps: int
    warmup_steps: int
    decay_steps: int
    epochs: float
    budget: Budget
    eval_budget: Mapping[str, int] | None
    parameters: ParameterCounts
    mesh: Mapping[str, int]
    memory: Memory
    replay: ReplayPlan | None = None

    def to_dict(self) -> dict[str, object]:
        return {
            **asdict(self),
            "parameters": self.parameters.total,
            "trained_parameters": self.parameters.trained,
            "estimated_bytes_per_device": self.memory.total,
        }

    def describe(self) -> str:
        """Return lines for the user."""
        b = self.budget
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        m = self.memory
        decay = f", {self.decay_steps:,} decay" if self.decay_steps else ""
        frozen = f"frozen {m.frozen / GIB:.2f}, " if m.frozen else ""
        frozen += f"reference {m.reference / GIB:.2f}, " if m.reference else ""
        lines = [
            f"steps        {self.total_steps:,} ({self.epochs:.2f} epochs of "
            f"{b['steps_per_epoch']:,} steps, {self.warmup_steps:,} of them warm-up{decay})",
            f"blocks       {b['blocks']:,} of {b['block_size']:,} tokens, "
            f"{b['blocks_per_update']:,} per update, "
            f"{b['empty_blocks_in_last_update']:,} empty in an epoch's last update",
            f"slot         {_spread(b['slot_tokens_per_update'])} tokens per update",
            f"real         {_spread(b['real_tokens_per_update'])} tokens per update",
            f"supervised   {_spread(b['supervised_tokens_per_update'])} tokens per update",
            f"parameters   {self._told_parameters()}",
            f"mesh         {mesh or 'one device'}",
            f"memory       about {m.total / GIB:.2f} GiB per device (estimate): weights "
            f"{m.weights / GIB:.2f}, {frozen}optimizer {m.optimizer / GIB:.2f}, gradients "
            f"{m.gradients / GIB:.2f}, activations {m.activations / GIB:.2f}",
        ]
        if self.replay is not None:
            lines.insert(5, f"replay       {_told_replay(self.replay)}")
        if self.eval_budget is not None:
            lines.append(
                f"held out     {self.eval_budget['examples']:,} examples in "
                f"{self.eval_budget['blocks']:,} blocks"
            )
        return "\n".join(f"  {line}" for line in lines)

    def _told_parameters(self) -> str:
        counts = self.parameters
        if not counts.frozen:
            return f"{counts.total:,}"
        share = f"{counts.trained / counts.total:.2%}"
        return f"{counts.total:,}: {counts.trained:,} trained ({share}), {counts.frozen:,} frozen"


def _told_replay(r: ReplayPlan) -> str:
    course = f"{r['start']:.1%}"
    if r["shape"] != "constant":
        course += f" to {r['end']:.1%} ({r['shape']})"
    return (
        f"{course} of the supervised tokens, {r['share']:.2%} over the run; "
        f"{r['passes']:.2f} passes over its {r['blocks']:,} blocks"
    )


def _spread(numbers: Spread) -> str:
    if numbers["min"] == numbers["max"]:
        return f"{numbers['mean']:,.0f}"
    return f"{numbers['mean']:,.0f} on average ({numbers['min']:,.0f} to {numbers['max']:,.0f})"


class StepPlan(NamedTuple):
    """The number of updates of a run, and the size of each. Independent of the trainer."""

    total_steps: int
    warmup_steps: int
    decay_steps: int
    epochs: float
    budget: Budget
    replay: ReplayPlan | None


def data_order(config: TrainConfig, data: PackedDataset, total_steps: int) -> DataOrder:
    """Return the order of a run's blocks."""
    seed, size, d = config.seed, config.task.global_batch_size, config.dataset
    schedule = d.replay_schedule
    if schedule.start is None:
        return DataOrder(data, seed, size)
    end = schedule.start if schedule.end is None else schedule.end
    places = [data.source_names.index(part.name) for part in d.mixture if part.replay]
    replay = ReplayOrder(
        data.block_supervised_tokens,
        np.isin(data.block_sources, places),
        ReplaySchedule(schedule.start, end, schedule.shape),
        seed=seed,
        global_batch_size=size,
        total_steps=total_steps,
    )
    return DataOrder(data, seed, size, replay)


def plan_steps(config: TrainConfig, data: PackedDataset) -> StepPlan:
    """Return the number of updates, from the data and the config's options for the run's length."""
    task = config.task
    total = count_steps(
        max_steps=task.max_steps,
        num_epochs=task.num_epochs,
        steps_per_epoch=steps_per_epoch(data.num_blocks, task.global_batch_size),
    )
    order = data_order(config, data, total)
    budget = batch_budget(data, config.seed, task.global_batch_size, order.replay)
    s = task.lr_scheduler
    warmup = count_part(s.warmup_steps, s.warmup_ratio, total)
    decay = count_part(s.decay_steps, s.decay_ratio, total)
    if decay and warmup + decay > total:
        raise ConfigError(
            f"task.lr_scheduler: a warm-up of {warmup:,} updates and a decay of {decay:,}, "
            f"expected at most {total:,} together, the updates of the run. Lower decay_steps (or "
            "decay_ratio), or train longer."
        )
    replay = order.replay and order.replay.plan()
    return StepPlan(total, warmup, decay, order.epoch(total), budget, replay)


def count_steps(*, max_steps: int | None, num_epochs: float | None, steps_per_epoch: int) -> int:
    """Return the total updates; a fraction of an epoch is rounded up, so that no requested row is
    left out."""
    if max_steps is not None:
        return max_steps
    assert num_epochs is not None
    return max(1, math.ceil(round(num_epochs * steps_per_epoch, 6)))


def count_part(steps: int | None, ratio: float | None, total_steps: int) -> int:
    """Return a part of a schedule in updates, from either option for it."""
    if steps is not None:
        return steps
    return math.ceil(round((ratio or 0.0) * total_steps, 6))


def flops_per_token(a: Architecture, counts: ParameterCounts, block_size: int) -> int:
    """Return the FLOPs of a training step per slot token of a block (metrics/throughput.py)."""
    sizes = ModelSizes(
        num_parameters=counts.total,
        trained_parameters=counts.trained,
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        tied_embeddings=a.tie_word_embeddings,
        windows=tuple(layer.window for layer in a.layers),
        num_heads=a.num_attention_heads,
        head_size=a.head_dim,
    )
    return model_flops_per_token(sizes, block_size)
