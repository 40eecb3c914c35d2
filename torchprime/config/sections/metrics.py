"""The section `metrics`: the trackers that show a run beside its metrics.jsonl."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchprime.config.checks import not_empty, positive, refuse

TrackerName = Literal["tensorboard", "wandb", "mlflow", "trackio"]


@dataclass(frozen=True)
class MetricsConfig:
    """The trackers of a run; its metrics.jsonl has every record with any of them."""

    trackers: list[TrackerName] = field(default_factory=lambda: ["tensorboard"])
    project: str = "torchprime"  # a group of runs; MLflow calls it experiment
    offline: bool = False  # trackers write to this machine only
    finish_seconds: float = 60.0  # the longest wait at the run's end until a tracker has everything

    def __post_init__(self) -> None:
        twice = sorted({name for name in self.trackers if self.trackers.count(name) > 1})
        if twice:
            refuse(
                "metrics.trackers",
                self.trackers,
                f"each tracker once ({', '.join(twice)} is listed twice)",
                "Take one of them out.",
            )
        not_empty("metrics.project", self.project)
        positive("metrics.finish_seconds", self.finish_seconds)
