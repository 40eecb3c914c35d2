"""The section `adapter`: which weights are trained, and how the others are stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torchprime.config.checks import at_least, fraction, not_empty, positive, refuse
from torchprime.config.paths import HubNameOrFolder


@dataclass(frozen=True)
class AdapterConfig:
    """Training of small matrices beside frozen weights; without a rank, all weights are trained."""

    rank: int | None = None  # null: no adapter
    alpha: float = 32.0
    scaling: Literal["lora", "rslora"] = "lora"  # alpha / rank, or alpha / sqrt(rank)
    dropout: float = 0.0
    targets: list[str] = field(default_factory=lambda: ["all-linear"])
    layers: list[int] | None = None  # null: all
    modules_to_train: list[str] = field(default_factory=list)
    init: Literal["kaiming", "gaussian"] = "kaiming"
    dora: bool = False
    base_dtype: Literal["run", "int8", "nf4"] = "run"  # of the frozen linear layers
    # A PEFT folder to start from; what it says of the adapter replaces the keys above.
    pretrained: HubNameOrFolder | None = None

    def __post_init__(self) -> None:
        at_least("adapter.rank", self.rank, 1)
        positive("adapter.alpha", self.alpha)
        fraction("adapter.dropout", self.dropout, one_allowed=False)
        not_empty("adapter.pretrained", self.pretrained)
        _names("adapter.targets", self.targets)
        _names("adapter.modules_to_train", self.modules_to_train)
        for place, number in enumerate(self.layers or ()):
            at_least(f"adapter.layers[{place}]", number, 0)
        for key, given, empty, example in (
            ("adapter.targets", self.targets, [], "[all-linear]"),
            ("adapter.layers", self.layers, [], "null for all layers"),
        ):
            if given == empty:
                refuse(key, given, "at least one", f"Set {key}={example}.")
        if not self.enabled and self.base_dtype != "run":
            refuse(
                "adapter.base_dtype",
                self.base_dtype,
                "run, since adapter=none trains all weights, and quantized ones can't be trained",
                "Set adapter=qlora, or adapter=lora adapter.base_dtype=" + self.base_dtype + ".",
            )

    @property
    def enabled(self) -> bool:
        """Return True if an adapter is trained, and not all weights."""
        return self.rank is not None or self.pretrained is not None

    def trains_whole(self, module: str) -> bool:
        """Return True if `modules_to_train` names this module."""
        return any(name.rpartition(".")[2] == module for name in self.modules_to_train)


def _names(key: str, names: Sequence[str]) -> None:
    for place, name in enumerate(names):
        if not name.strip():
            refuse(f"{key}[{place}]", name, "a name", "Remove it.")
