"""The plan of a run in numbers, before it starts: steps, tokens per update, bytes per device."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from torchprime.data.blocks.budget import batch_budget
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.metrics.throughput import model_flops_per_token
from torchprime.models.architecture import Architecture
from torchprime.sharding import Spec, shard_count
from torchprime.training.optim import Optimizer, Parameter, decays

GIB = 2**30


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
    shapes: Mapping[str, tuple[int, ...]],
    specs: Mapping[str, Spec],
    mesh: Mapping[str, int],
    optimizer: Optimizer,
    *,
    weight_bytes: int,
    master_weights: bool,
    accumulation: int,
    micro_batch: int,
    block_size: int,
    hidden_size: int,
    intermediate_size: int,
    vocab_size: int,
    num_layers: int,
    loss_chunks: int,
    remat: str,
) -> Memory:
    """Estimate one device's share; sizes in bytes, `micro_batch` in blocks over all devices, and
    `remat` one of the config's policies."""
    weights = state = gradients = 0
    for name, shape in shapes.items():
        spec = specs[name]
        share = math.prod(shape) // shard_count(spec, mesh)
        weights += share * weight_bytes
        # Summed in fp32 when there are several micro-batches, in the weights' type otherwise.
        gradients += share * (4 if accumulation > 1 else weight_bytes)
        info = Parameter(shape, None, decays(name), stacked=False)  # type: ignore[arg-type]
        for slot in optimizer.slots(info).values():
            kept = tuple(spec[d] for d in slot.dims)
            elements = math.prod(shape[d] for d in slot.dims)
            state += elements // shard_count(kept, mesh) * 4
        if weight_bytes < 4 and master_weights:
            state += share * 4
    rows = max(1, micro_batch // (mesh["data"] * mesh["fsdp"]))
    tokens = rows * block_size
    hidden = tokens * hidden_size * weight_bytes
    tensors = {"none": 16 + 3 * intermediate_size // hidden_size, "full": 1, "offload": 0}
    logits = 2 * 4 * rows * math.ceil(block_size / loss_chunks) * vocab_size
    return Memory(weights, state, gradients, hidden * tensors[remat] * num_layers + logits)


def checkpoint_bytes(
    shapes: Mapping[str, tuple[int, ...]],
    optimizer: Optimizer,
    *,
    weight_bytes: int,
    master_weights: bool,
) -> int:
    """Return the size of a checkpoint's tensors: weights, master copies and the optimizer's
    state."""
    total = 0
    for name, shape in shapes.items():
        info = Parameter(shape, None, decays(name), stacked=False)  # type: ignore[arg-type]
        slots = optimizer.slots(info).values()
        total += math.prod(shape) * weight_bytes
        total += 4 * sum(math.prod(shape[d] for d in slot.dims) for slot in slots)
        if weight_bytes < 4 and master_weights:
            total += 4 * math.prod(shape)
    return total


@dataclass(frozen=True)
class Plan:
    """Everything known before the first step."""

    total_steps: int
    warmup_steps: int
    epochs: float
    budget: Mapping[str, Any]
    eval_budget: Mapping[str, int] | None
    parameters: int
    mesh: Mapping[str, int]
    memory: Memory

    def to_dict(self) -> dict[str, Any]:
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
            *(
                f"{kind:<12} {_spread(b[f'{kind}_tokens_per_update'])} tokens per update"
                for kind in ("slot", "real", "supervised")
            ),
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


def _spread(numbers: Mapping[str, float]) -> str:
    if numbers["min"] == numbers["max"]:
        return f"{numbers['mean']:,.0f}"
    return f"{numbers['mean']:,.0f} on average ({numbers['min']:,.0f} to {numbers['max']:,.0f})"


class StepPlan(NamedTuple):
    """The number of updates of a run, and the size of each. Independent of the trainer."""

    total_steps: int
    warmup_steps: int
    epochs: float
    budget: dict[str, Any]


def plan_steps(
    data: PackedDataset,
    *,
    seed: int,
    global_batch_size: int,
    max_steps: int | None,
    num_epochs: float | None,
    warmup_steps: int | None,
    warmup_ratio: float | None,
) -> StepPlan:
    """Return the number of updates, from the data and the config's options for the run's length."""
    budget = batch_budget(data, seed, global_batch_size)
    per_epoch = budget["steps_per_epoch"]
    total = count_steps(max_steps=max_steps, num_epochs=num_epochs, steps_per_epoch=per_epoch)
    warmup = count_warmup(warmup_steps=warmup_steps, warmup_ratio=warmup_ratio, total_steps=total)
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
    return model_flops_per_token(
        num_parameters=num_parameters,
        vocab_size=a.vocab_size,
        hidden_size=a.hidden_size,
        tied_embeddings=a.tie_word_embeddings,
        num_layers=a.num_hidden_layers,
        num_heads=a.num_attention_heads,
        head_size=a.head_dim,
        block_size=block_size,
    )
