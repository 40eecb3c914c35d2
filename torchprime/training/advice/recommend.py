"""Values to start from, each with its reason and source (assets/advice/table.yaml)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from torchprime.config.schema import TrainConfig
from torchprime.training.advice.memory import Estimator
from torchprime.training.advice.table import Devices, advice_in, first_fit, table

# Policies of remat and what they compute twice, the least first.
AGAIN = {
    "minimal": "norms and activation functions are computed",
    "attention": "these and two products of a layer are computed",
    "full": "layers are computed",
}


@dataclass(frozen=True)
class Recommendation:
    """A value for a key of the config, with its reason and source."""

    key: str
    value: Any
    reason: str
    source: str = ""  # empty: the reason is a number of this plan


@dataclass(frozen=True)
class RowFacts:
    """Facts about the training rows that recommendations depend on.

    Attributes:
        longest: tokens of the longest example.
        most: tokens that 99 of 100 examples do not exceed.
        cut: examples that the config's block size dropped or shortened.
    """

    examples: int
    longest: int
    most: int
    real_tokens: int
    cut: int


def on_devices(config: TrainConfig, devices: Devices) -> tuple[TrainConfig, list[Recommendation]]:
    """Return the config with a mesh for these devices, and the changes of its keys.

    A config whose mesh has as many devices keeps it. Otherwise all of them are on the fsdp axis.
    """
    if config.device_count == devices.count:
        return config, []
    sizes = {"data": 1, "fsdp": devices.count, "tensor": 1}
    ici = replace(config.ici_mesh, **sizes)
    dcn = replace(config.dcn_mesh, data=1, fsdp=1, tensor=1)
    batch = _multiple(config.task.global_batch_size, devices.count)
    task = replace(config.task, gradient_accumulation_steps=1, global_batch_size=batch)
    why = f"--device asks for {devices.count}, and the config's mesh has {config.device_count}"
    changes = [
        Recommendation(f"{mesh}.{axis}", size, why)
        for mesh, now, then in (
            ("ici_mesh", config.ici_mesh, ici),
            ("dcn_mesh", config.dcn_mesh, dcn),
        )
        for axis, size in ((axis, getattr(then, axis)) for axis in sizes)
        if getattr(now, axis) != size
    ]
    return replace(config, ici_mesh=ici, dcn_mesh=dcn, task=task), changes


def recommend_block_size(config: TrainConfig, rows: RowFacts, context: int) -> Recommendation:
    """Recommend the smallest block that holds the longest example, and two of most.

    In smaller blocks much of each is padding: hardly any two examples fit together.

    Args:
        context: the model's max_position_embeddings.
    """
    given, known = config.dataset.block_size, table()["block_size"]
    if rows.cut:
        larger = [size for size in known["values"] if given < size <= context]
        value = larger[0] if larger else given
        reason = f"{rows.cut:,} examples do not fit blocks of {given:,}; plan again with {value:,}"
        if not larger:
            reason = f"{rows.cut:,} examples are longer than the model's context"
        return Recommendation("dataset.block_size", value, reason)
    fitting = [size for size in known["values"] if rows.longest <= size <= context]
    roomy = [size for size in fitting if size >= 2 * rows.most]
    value = [*roomy, *fitting[-1:], given][0]
    reason = (
        f"the longest example has {rows.longest:,} tokens, 99% have at most {rows.most:,}; "
        f"{known['reason']}"
    )
    return Recommendation("dataset.block_size", value, reason, known["source"])


def recommend_remat(estimator: Estimator) -> list[Recommendation]:
    """Recommend remat if not even one block per device fits without it: of the policies that fit
    the one that computes least again."""
    remat = estimator.config.remat
    if remat.recomputes or estimator.largest_rows():
        return []
    for policy, again in AGAIN.items():
        changed = replace(estimator.config, remat=replace(remat, policy=policy))
        if policy == "full" or estimator.with_config(changed).largest_rows():
            reason = f"one block per device does not fit without it; {again} twice"
            return [Recommendation("remat.policy", policy, reason)]
    return []


def recommend_batch(estimator: Estimator, wanted_tokens: int) -> list[Recommendation]:
    """Recommend micro-batches that fit and keep the wanted slot tokens per update.

    Args:
        estimator: of a config with the recommended block size and mesh.
        wanted_tokens: slot tokens per update.

    Returns:
        Nothing if not even one block per device fits.
    """
    shards, size = estimator.batch_shards, estimator.config.dataset.block_size
    per_device = math.ceil(max(1, round(wanted_tokens / size)) / shards)
    at_once = estimator.largest_rows(1)
    if at_once >= per_device:
        rows, accumulation = per_device, 1
    else:
        most = estimator.largest_rows(2)
        if most == 0:
            return []
        accumulation = math.ceil(per_device / most)
        rows = math.ceil(per_device / accumulation)
    batch = rows * accumulation * shards
    tokens = f"{batch * size:,} slot tokens per update, wanted are {wanted_tokens:,}"
    fits = f"{rows} blocks of {size:,} per device fit at once, the largest number is "
    largest = at_once if accumulation == 1 else estimator.largest_rows(accumulation)
    return [
        Recommendation("task.global_batch_size", batch, tokens),
        Recommendation("task.gradient_accumulation_steps", accumulation, f"{fits}{largest}"),
    ]


def recommend_training(
    config: TrainConfig, rows: RowFacts, parameters: int
) -> list[Recommendation]:
    """Recommend learning rate, passes and warm-up.

    Args:
        parameters: of the whole model.
    """
    kind = "adapter" if config.adapter.enabled else "all weights"
    rate = first_fit(table()["learning_rate"][kind], "up_to_parameters", parameters)
    passes = first_fit(table()["passes"], "up_to_rows", rows.examples)
    warmup = advice_in(table()["warmup"])
    return [
        Recommendation("task.optimizer.learning_rate", rate.value, rate.reason, rate.source),
        Recommendation("task.num_epochs", passes.value, passes.reason, passes.source),
        Recommendation("task.max_steps", None, "the number of passes decides the length"),
        Recommendation(
            "task.lr_scheduler.warmup_ratio", warmup.value, warmup.reason, warmup.source
        ),
        Recommendation("task.lr_scheduler.warmup_steps", None, "the ratio decides the warm-up"),
    ]


def _multiple(value: int, of: int) -> int:
    return of * max(1, round(value / of))
