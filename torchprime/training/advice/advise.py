"""The advice for a config: what it needs on given devices, and values to start from.

config, model files, rows -> facts and need as configured -> recommendations -> need with them
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from torchprime.config.schema import TrainConfig
from torchprime.training.advice.memory import Estimator, Need
from torchprime.training.advice.recommend import (
    Recommendation,
    RowFacts,
    on_devices,
    recommend_batch,
    recommend_block_size,
    recommend_remat,
    recommend_training,
)
from torchprime.training.advice.table import Devices
from torchprime.training.setup.adapter import ModelForm
from torchprime.training.setup.datasets import RunData
from torchprime.training.setup.model_files import ModelFiles
from torchprime.training.setup.plan import (
    ParameterCounts,
    StepPlan,
    count_parameters,
    plan_steps,
    stored_parameters,
)

# Prepares the rows of a config.
ReadRows = Callable[[TrainConfig], RunData]


@dataclass(frozen=True)
class Outlook:
    """A config in numbers: its updates, and the bytes of one device."""

    steps: StepPlan
    tokens_per_update: int  # slots
    supervised_tokens: int  # of one pass
    need: Need

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.steps._asdict(),
            "slot_tokens_per_update": self.tokens_per_update,
            "supervised_tokens": self.supervised_tokens,
            "bytes_per_device": self.need.to_dict(),
        }


@dataclass(frozen=True)
class Advised:
    """The result.

    Attributes:
        devices: None if the user named none; then nothing says what fits.
        changes: recommended values that differ from the config's.
        kept: recommended values that the config has already.
        advised: the outlook with the changes; None if not even one block per device fits.
    """

    parameters: ParameterCounts
    rows: RowFacts
    devices: Devices | None
    configured: Outlook
    changes: Sequence[Recommendation]
    kept: Sequence[Recommendation]
    advised: Outlook | None

    def fits(self, outlook: Outlook) -> bool:
        """Return True if an outlook fits the devices, or if there are none."""
        return self.devices is None or outlook.need.total <= self.devices.room

    def to_dict(self) -> dict[str, Any]:
        return {
            "parameters": {**self.parameters._asdict(), "total": self.parameters.total},
            "rows": asdict(self.rows),
            "devices": self.devices and {**asdict(self.devices), "room": self.devices.room},
            "configured": self.configured.to_dict(),
            "configured_fits": self.fits(self.configured),
            "changes": [asdict(each) for each in self.changes],
            "kept": [asdict(each) for each in self.kept],
            "advised": self.advised and self.advised.to_dict(),
        }


def advise(
    config: TrainConfig, files: ModelFiles, devices: Devices | None, read_rows: ReadRows
) -> Advised:
    """Compute the advice for a config.

    Args:
        devices: those the run would have; None if it is not known.

    Raises:
        ConfigError: names or shapes that the config's sharding table does not fit.
    """
    data, dtype = read_rows(config), getattr(torch, config.torch_dtype)
    rows = facts_of(data)
    counts = count_parameters(stored_parameters(files.build(dtype)), files.shapes)
    here = devices or Devices("cpu", "gpu", config.device_count, 0, 1.0)
    placed, found = on_devices(config, here)

    def estimator(config: TrainConfig) -> Estimator:
        adapter = files.adapter and replace(files.adapter, mesh=config.mesh_shape())
        form = ModelForm(files.architecture, adapter)
        return Estimator(config, form, here, longest=rows.longest)

    configured = _outlook(estimator(placed), data)
    context = files.architecture.max_position_embeddings
    found.append(recommend_block_size(config, rows, context))
    wanted = config.task.global_batch_size * config.dataset.block_size
    batch: list[Recommendation] = []
    if devices is not None:
        resized = with_values(placed, {found[-1].key: found[-1].value})
        remat = recommend_remat(estimator(resized))
        smaller = with_values(resized, {each.key: each.value for each in remat})
        batch = recommend_batch(estimator(smaller), wanted)
        found += remat if batch else []
    found += [*batch, *recommend_training(config, rows, counts.total)]
    changes = [each for each in found if _value(config, each.key) != each.value]
    advised = None
    if batch or devices is None:
        new = with_values(config, {each.key: each.value for each in changes})
        same = new.dataset == config.dataset
        advised = _outlook(estimator(new), data if same else read_rows(new))
    kept = [each for each in found if each not in changes and each.value is not None]
    return Advised(counts, rows, devices, configured, changes, kept, advised)


def facts_of(data: RunData) -> RowFacts:
    """Return what the recommendations need to know about the training rows."""
    report = data.report
    return RowFacts(
        examples=data.train.num_examples,
        longest=int(report.lengths["max"]),
        most=int(report.lengths["p99"]),
        real_tokens=data.train.real_tokens,
        cut=len(report.truncated),
    )


def with_values(config: TrainConfig, values: Mapping[str, Any]) -> TrainConfig:
    """Return a config with other values, by their dotted keys, all set at once.

    Raises:
        ConfigError: values that don't fit each other.
    """
    return _replaced(config, tree_of(values))


def tree_of(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested dicts of values that are given by dotted keys."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *sections, last = key.split(".")
        inside = tree
        for section in sections:
            inside = inside.setdefault(section, {})
        inside[last] = value
    return tree


def _replaced(section: Any, values: Mapping[str, Any]) -> Any:
    new = {
        name: _replaced(getattr(section, name), value) if isinstance(value, dict) else value
        for name, value in values.items()
    }
    return replace(section, **new)


def _value(config: TrainConfig, key: str) -> Any:
    found: Any = config
    for name in key.split("."):
        found = getattr(found, name)
    return found


def _outlook(estimator: Estimator, data: RunData) -> Outlook:
    config, task = estimator.config, estimator.config.task
    rows = max(1, task.micro_batch_size // estimator.batch_shards)
    return Outlook(
        steps=plan_steps(config, data.train),
        tokens_per_update=task.global_batch_size * config.dataset.block_size,
        supervised_tokens=data.train.supervised_tokens,
        need=estimator.need(rows, task.gradient_accumulation_steps),
    )
