"""The plan of a run in numbers, before it starts: steps, tokens per update, bytes per device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch

from torchprime.config.schema import TrainConfig
from torchprime.data.blocks.budget import Budget, Spread, batch_budget
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.metrics.throughput import ModelSizes, model_flops_per_token
from torchprime.models.architecture import Architecture
from torchprime.sharding import Spec, shard_count
from torchprime.training.optim import Optimizer, Parameter, decays

GIB = 2**30
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Memory:
    """Estimated bytes on one device.

    Weights, master copies, optimizer state and gradients follow from shapes and sharding.
    Activations are what the backward pass needs: each layer's input under full remat, nothing
    if host memory holds it, otherwise about 16 + 3 F/D hidden-sized tensors per layer; plus one
    chunk of logits with its gradient.
    """

    weights: int
    optimizer: int
    gradients: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.optimizer + self.gradients + self.activations


def estimate_memory(
    config: TrainConfig,
    architecture: Architecture,
    shapes: Mapping[str, Shape],
    specs: Mapping[str, Spec],
    optimizer: Optimizer,
) -> Memory:
    """Return the estimated share of one device of the config's mesh.

    Args:
        shapes: of the parameters, and `specs` their sharding, by name.
    """
    weights, state = _stored_bytes(config, shapes, specs, optimizer)
    dtype = getattr(torch, config.torch_dtype)
    # Summed in fp32 when there are several micro-batches, in the weights' type otherwise.
    summed = 4 if config.task.gradient_accumulation_steps > 1 else dtype.itemsize
    gradients = weights // dtype.itemsize * summed
    return Memory(weights, state, gradients, _activation_bytes(config, architecture))


def _stored_bytes(
    config: TrainConfig,
    shapes: Mapping[str, Shape],
    specs: Mapping[str, Spec],
    optimizer: Optimizer,
) -> tuple[int, int]:
    """Return one device's bytes of weights, and of the optimizer's state with master copies."""
    mesh, dtype = config.mesh_shape(), getattr(torch, config.torch_dtype)
    has_master = dtype.itemsize < 4 and config.task.optimizer.master_weights
    weights = state = 0
    for name, shape in shapes.items():
        spec = specs[name]
        share = math.prod(shape) // shard_count(spec, mesh)
        weights += share * dtype.itemsize
        facts = Parameter(shape, dtype, decays(name), stacked=False)
        for slot in optimizer.slots(facts).values():
            kept = tuple(spec[d] for d in slot.dims)
            elements = math.prod(shape[d] for d in slot.dims)
            state += elements // shard_count(kept, mesh) * 4
        if has_master:
            state += share * 4
    return weights, state


def _activation_bytes(config: TrainConfig, architecture: Architecture) -> int:
    c, a, mesh = config, architecture, config.mesh_shape()
    rows = max(1, c.task.micro_batch_size // (mesh["data"] * mesh["fsdp"]))
    tokens = rows * c.dataset.block_size
    hidden = tokens * a.hidden_size * getattr(torch, c.torch_dtype).itemsize
    tensors = {"none": 16 + 3 * a.intermediate_size // a.hidden_size, "full": 1, "offload": 0}
    logits = 2 * 4 * rows * math.ceil(c.dataset.block_size / c.task.loss_chunks) * a.vocab_size
    return hidden * tensors[c.remat.policy] * a.num_hidden_layers + logits


def checkpoint_bytes(config: TrainConfig, shapes: Mapping[str, Shape], optimizer: Optimizer) -> int:
    """Return the size of a checkpoint's tensors: weights, master copies and the optimizer's
    state."""
    whole: dict[str, Spec] = {name: ((),) * len(shape) for name, shape in shapes.items()}
    return sum(_stored_bytes(config, shapes, whole, optimizer))


@dataclass(frozen=True)
class Plan:
    """Everything known before the first step."""

    total_steps: int
    warmup_steps: int
    epochs: float
    budget: Budget
    eval_budget: Mapping[str, int] | None
    parameters: int
    mesh: Mapping[str, int]
    memory: Memory

    def to_dict(self) -> dict[str, object]:
        return {**asdict(self), "estimated_bytes_per_device": self.memory.total}

    def describe(self) -> str:
        """Return lines for the user."""
        b = self.budget
        mesh = " x ".join(f"{axis}={size}" for axis, size in self.mesh.items() if size > 1)
        m = self.memory
        lines = [
            f"steps        {self.total_steps:,} ({self.epochs:.2f} epochs of "
            f"{b['steps_per_epoch']:,} steps, {self.warmup_steps:,} of them warm-up)",
            f"blocks       {b['blocks']:,} of {b['block_size']:,} tokens, "
            f"{b['blocks_per_update']:,} per update, "
            f"{b['empty_blocks_in_last_update']:,} empty in an epoch's last update",
            f"slot         {_spread(b['slot_tokens_per_update'])} tokens per update",
            f"real         {_spread(b['real_tokens_per_update'])} tokens per update",
            f"supervised   {_spread(b['supervised_tokens_per_update'])} tokens per update",
            f"parameters   {self.parameters:,}",
            f"mesh         {mesh or 'one device'}",
            f"memory       about {m.total / GIB:.2f} GiB per device (estimate): weights "
            f"{m.weights / GIB:.2f}, optimizer {m.optimizer / GIB:.2f}, gradients "
            f"{m.gradients / GIB:.2f}, activations {m.activations / GIB:.2f}",
        ]
        if self.eval_budget is not None:
            lines.append(
                f"held out     {self.eval_budget['examples']:,} examples in "
                f"{self.eval_budget['blocks']:,} blocks"
            )
        return "\n".join(f"  {line}" for line in lines)


def _spread(numbers: Spread) -> str:
    if numbers["min"] == numbers["max"]:
        return f"{numbers['mean']:,.0f}"
    return f"{numbers['mean']:,.0f} on average ({numbers['min']:,.0f} to {numbers['max']:,.0f})"


class StepPlan(NamedTuple):
    """The number of updates of a run, and the size of each. Independent of the trainer."""

    total_steps: int
    warmup_steps: int
    epochs: float
    budget: Budget


def plan_steps(config: TrainConfig, data: PackedDataset) -> StepPlan:
    """Return the number of updates, from the data and the config's options for the run's length."""
    task = config.task
    budget = batch_budget(data, config.seed, task.global_batch_size)
    per_epoch = budget["steps_per_epoch"]
    total = count_steps(
        max_steps=task.max_steps, num_epochs=task.num_epochs, steps_per_epoch=per_epoch
    )
    warmup = count_warmup(
        warmup_steps=task.lr_scheduler.warmup_steps,
        warmup_ratio=task.lr_scheduler.warmup_ratio,
        total_steps=total,
    )
    return StepPlan(total, warmup, total / per_epoch, budget)


def count_steps(*, max_steps: int | None, num_epochs: float | None, steps_per_epoch: int) -> int:
    """Return the total updates; a fraction of an epoch is rounded up, so that no requested row is
    left out."""
    if max_steps is not None:
        return max_steps
    assert num_epochs is not None
    return max(1, math.ceil(round(num_epochs * steps_per_epoch, 6)))


def count_warmup(*, warmup_steps: int | None, warmup_ratio: float | None, total_steps: int) -> int:
    """Return the warm-up in updates, from either option for it."""
    if warmup_steps is not None:
        return warmup_steps
    return math.ceil(round((warmup_ratio or 0.0) * total_steps, 6))


def flops_per_token(a: Architecture, num_parameters: int, block_size: int) -> int:
    """Return the FLOPs of a training step per slot token of a block (metrics/throughput.py)."""
    sizes = ModelSizes(
        num_parameters=num_parameters,
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        tied_embeddings=a.tie_word_embeddings,
        num_layers=a.num_hidden_layers,
        num_heads=a.num_attention_heads,
        head_size=a.head_dim,
    )
    return model_flops_per_token(sizes, block_size)
