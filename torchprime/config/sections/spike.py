"""The section `task.spike`: what becomes of an update whose loss or gradient norm jumps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torchprime.config.checks import at_least, positive, refuse


@dataclass(frozen=True)
class SpikeConfig:
    """Watch for updates whose loss or gradient norm is far above its running mean."""

    window: int | None = None  # updates; null: off
    deviations: float = 6.0  # standard deviations above the mean
    action: Literal["warn", "skip"] = "warn"

    def __post_init__(self) -> None:
        at_least("task.spike.window", self.window, 2)
        positive("task.spike.deviations", self.deviations)
        if self.window is None and self.action == "skip":
            refuse(
                "task.spike.window",
                None,
                "a number of updates, since task.spike.action=skip",
                "Set task.spike.window=100, or task.spike.action=warn.",
            )
