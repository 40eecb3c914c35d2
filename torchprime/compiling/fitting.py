"""The search, by compiling, for the smallest change to a config that fits a chip.

Changes that keep the mathematics come first (recomputing, weights over more chips, layer
inputs in host memory, smaller micro-batches), then those that do not (another optimizer, no fp32
master weights; with an adapter, a quantized base), then twice as many chips, and at last an
adapter instead of all weights. A config whose weights and optimizer state alone do not fit is not
tried.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torchprime.compiling.theory import Sizes
from torchprime.config.load import load_config
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.remat import POLICIES, RematConfig
from torchprime.config.topologies import TOPOLOGIES, topology
from torchprime.errors import ConfigError, UserError
from torchprime.training.setup.plan import reference_bytes

Change = dict[str, Any]  # values by dotted key
# Policies of remat with names that they save besides. Each computes more again than the one before:
# two products of the MLP, then those of the projections too, then attention too.
LESS_AND_LESS = (("attention", []), ("full", ["core_out"]), ("full", []))


def changes(config: TrainConfig, rows: int, *, scannable: bool = True) -> Iterator[Change]:
    """Yield changes to try, each complete by itself, the least intrusive first.

    Args:
        rows: blocks of a micro-batch on one chip.
        scannable: layers are all alike, and can be one loop.
    """
    mesh = config.ici_mesh
    scanned = config.remat.scan_layers
    loop: Change = {"remat.scan_layers": True} if scannable and not scanned else {}
    steps = [{**loop, **change} for change in _recomputing(config.remat)]
    yield from steps or ([loop] if loop else [])
    same = steps[-1] if steps else loop
    if mesh.data > 1:
        same = {**same, "ici_mesh.data": 1, "ici_mesh.fsdp": mesh.data * mesh.fsdp}
        yield same
    ways = [same]
    if (scanned or scannable) and config.remat.policy != "offload":
        ways.append({**same, "remat.policy": "offload"})
        yield ways[1]
    fewer: Change = {}
    if rows > 1:
        fewer = {"task.gradient_accumulation_steps": config.task.gradient_accumulation_steps * rows}
        for way in ways:
            yield {**way, **fewer}
    last = {**ways[-1], **fewer}
    for change in _bases(config) if config.adapter.enabled else _optimizers(config):
        yield {**same, **change}
        if len(ways) > 1 or fewer:
            yield {**last, **change}
    larger = _twice(config)
    if larger is not None:
        yield {**same, "compile_only": larger, "ici_mesh.fsdp": 2 * mesh.data * mesh.fsdp}
    if not config.adapter.enabled and config.model.pretrained_model is not None:
        yield {**last, "adapter.rank": 16}
        yield {**last, "adapter.rank": 16, "adapter.base_dtype": "nf4"}


def _recomputing(remat: RematConfig) -> Iterator[Change]:
    """Yield changes of remat that keep fewer names, the one that computes least again first."""
    kept = {*remat.saved, *remat.offloaded}
    cleared = {f"remat.{key}": [] for key in ("save", "recompute") if getattr(remat, key)}
    for policy, save in LESS_AND_LESS:
        if kept > {*POLICIES[policy], *save}:
            more: Change = {"remat.save": save} if save else {}
            yield {**cleared, "remat.policy": policy, **more}


def _bases(config: TrainConfig) -> Iterator[Change]:
    """Yield smaller types of an adapter's frozen weights; its optimizer state is small anyway."""
    if config.adapter.base_dtype == "run":
        yield {"adapter.base_dtype": "int8"}
    if config.adapter.base_dtype != "nf4":
        yield {"adapter.base_dtype": "nf4"}


def _optimizers(config: TrainConfig) -> Iterator[Change]:
    """Yield smaller optimizer states: another method, then also without an fp32 copy of the
    weights."""
    change: Change = {}
    if config.task.optimizer.name != "adafactor":
        change = {"task.optimizer.name": "adafactor"}
        yield change
    if config.task.optimizer.master_weights and config.torch_dtype != "float32":
        yield {**change, "task.optimizer.master_weights": False}


def _twice(config: TrainConfig) -> str | None:
    """Return the slice of the same chips with twice as many."""
    assert config.compile_only is not None
    own = topology(config.compile_only)
    for name, other in TOPOLOGIES.items():
        if other.chip is own.chip and other.chips == 2 * own.chips:
            return name
    return None


def changed(config: TrainConfig, change: Change) -> TrainConfig:
    """Return the config with these values, validated again."""
    whole = config.to_dict()
    for key, value in change.items():
        *sections, leaf = key.split(".")
        section = whole
        for name in sections:
            section = section[name]
        section[leaf] = value
    return load_config(whole)


def weights_per_chip(config: TrainConfig, sizes: Sizes) -> dict[str, int]:
    """Return the bytes of weights on one chip, `trained` and `frozen`, of the `optimizer`'s state
    with master weights, and of regularization's `reference`. Adafactor's state is left out: it is
    small."""
    trained, frozen = sizes.trained(), sizes.frozen()
    o, narrow = config.task.optimizer, sizes.weight_bytes < 4
    each = (8 if o.name == "adamw" else 0) + (4 if o.master_weights and narrow else 0)
    return {
        "trained": sum(weight.kept * weight.itemsize for weight in trained),
        "frozen": sum(weight.kept * weight.itemsize for weight in frozen),
        "optimizer": each * sum(weight.kept for weight in trained),
        "reference": reference_bytes(config) * sum(weight.kept for weight in trained),
    }


def state_bytes(config: TrainConfig, sizes: Sizes) -> int:
    """Return the bytes of weights and optimizer state on one chip, a lower bound."""
    return sum(weights_per_chip(config, sizes).values())


def find_nearest(
    config: TrainConfig,
    sizes_of: Callable[[TrainConfig], Sizes],
    limit: int,
    compile_one: Callable[[TrainConfig], Mapping[str, Any]],
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Compile one change after the other until one fits.

    Args:
        sizes_of: the sizes of a config.
        limit: bytes that a chip gives to a program.
        compile_one: makes the report (report.py) of a config.

    Returns:
        `overrides` to type (None if nothing fits), `total` bytes with them, and what was `tried`.
    """
    tried: list[str] = []
    rows, scannable = sizes_of(config).rows, _accepts(config, {"remat.scan_layers": True}, sizes_of)
    for change in changes(config, rows, scannable=scannable):
        overrides = [f"{key}={_text(value)}" for key, value in change.items()]
        name = " ".join(overrides)
        try:
            candidate = changed(config, change)
            if state_bytes(candidate, sizes_of(candidate)) > limit:
                tried.append(f"{name} (weights and state alone are too large)")
                continue
            say(f"does not fit; trying {name}")
            report = compile_one(candidate)
        except UserError as error:
            tried.append(f"{name} ({error})")
            continue
        if report["fits"]:
            total = report["memory"]["total"]
            return {"overrides": overrides, "total": total, "tried": tried}
        tried.append(name)
    return {"overrides": None, "total": None, "tried": tried}


def _accepts(config: TrainConfig, change: Change, sizes_of: Callable[[TrainConfig], Sizes]) -> bool:
    try:
        sizes_of(changed(config, change))
    except ConfigError:
        return False
    return True


def _text(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(map(str, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
