"""The section `task.loss`: what a step minimizes over its supervised tokens."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Literal

from torchprime.config.checks import at_least, fraction, refuse, shown

Average = Literal["tokens", "examples"]


@dataclass(frozen=True)
class LossConfig:
    """The average over tokens or examples, and the loss of a token."""

    average: Average = "tokens"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    dft: bool = False  # dynamic fine-tuning, arXiv:2508.05629

    def __post_init__(self) -> None:
        fraction("task.loss.label_smoothing", self.label_smoothing, one_allowed=False)
        at_least("task.loss.z_loss", self.z_loss, 0)
        if self.dft and self.label_smoothing > 0:
            refuse(
                "task.loss.label_smoothing",
                self.label_smoothing,
                "0, since task.loss.dft=true: dynamic fine-tuning is defined for the cross-entropy "
                "of the target alone",
                "Set task.loss.label_smoothing=0 or task.loss.dft=false.",
            )

    def describe(self) -> str:
        """Return what differs from the defaults, for the log; "" for nothing."""
        values = asdict(self)
        return ", ".join(
            f"{each.name}={shown(values[each.name])}"
            for each in fields(self)
            if values[each.name] != each.default
        )
