"""The nearest change to a config that fits a chip, found by compiling.

Changes that leave the mathematics alone come first (recomputing, smaller micro-batches), then those
that do not (another optimizer, no fp32 master weights). What cannot fit by its weights and
optimizer state alone is not tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torchprime.config.load import load_config
from torchprime.config.schema import TrainConfig
from torchprime.errors import ConfigError
from torchprime.metrics.compile_report import Sizes

Change = dict[str, Any]  # values by dotted key


def changes(config: TrainConfig, rows: int) -> Iterator[Change]:
    """Changes to try, each by itself whole, the least intrusive first.

    Args:
        rows: blocks of a micro-batch on one chip.
    """
    remat: Change = {}
    if config.remat.policy != "full":
        remat["remat.policy"] = "full"
    if not config.remat.scan_layers:
        remat["remat.scan_layers"] = True
    given = config.task.gradient_accumulation_steps
    batches = [{}]
    batches += [{"task.gradient_accumulation_steps": given * rows}] if rows > 1 else []
    optimizers: list[Change] = [{}]
    if config.task.optimizer.name != "adafactor":
        optimizers.append({"task.optimizer.name": "adafactor"})
    if config.task.optimizer.master_weights and config.torch_dtype != "float32":
        optimizers.append({**optimizers[-1], "task.optimizer.master_weights": False})
    for optimizer in optimizers:
        for batch in batches:
            change = {**remat, **batch, **optimizer}
            if change:
                yield change


def changed(config: TrainConfig, change: Change) -> TrainConfig:
    """The config with these values, checked anew."""
    whole = config.to_dict()
    for key, value in change.items():
        *sections, leaf = key.split(".")
        section = whole
        for name in sections:
            section = section[name]
        section[leaf] = value
    return load_config(whole)


def state_bytes(config: TrainConfig, sizes: Sizes) -> int:
    """Weights and optimizer state of one chip, from below."""
    each = sizes.weight_bytes
    each += 8 if config.task.optimizer.name == "adamw" else 0
    each += 4 if config.task.optimizer.master_weights and sizes.weight_bytes < 4 else 0
    elements = sum(
        math.prod(shape) // (sizes.pieces[name] * sizes.tensor)
        for name, shape in sizes.shapes.items()
    )
    return each * elements


def find_nearest(
    config: TrainConfig,
    sizes: Sizes,
    limit: int,
    compile_one: Callable[[TrainConfig], Mapping[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compile one change after the other until one fits.

    Args:
        limit: bytes that a chip gives to a program.
        compile_one: makes a report (compile_only.py) of a config.

    Returns:
        `overrides` to type (None if nothing fits), `total` bytes with them, and what was `tried`.
    """
    tried: list[str] = []
    for change in changes(config, sizes.rows):
        overrides = [f"{key}={_text(value)}" for key, value in change.items()]
        name = " ".join(overrides)
        try:
            candidate = changed(config, change)
        except ConfigError:
            continue
        if state_bytes(candidate, sizes) > limit:
            tried.append(f"{name} (weights and state alone are too large)")
            continue
        say(f"does not fit; trying {name}")
        report = compile_one(candidate)
        if report["fits"]:
            total = report["memory"]["total"]
            return {"overrides": overrides, "total": total, "tried": tried}
        tried.append(name)
    return {"overrides": None, "total": None, "tried": tried}


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
