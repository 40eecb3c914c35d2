"""The section `regularization`: terms of the loss that keep a run near its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchprime.config.checks import not_empty, positive, refuse
from torchprime.config.paths import LocalFolder
from torchprime.config.sections.adapter import AdapterConfig


@dataclass(frozen=True)
class EwcConfig:
    """Elastic weight consolidation: each weight is held by its Fisher information."""

    fisher: LocalFolder | None = None  # a folder that `torchprime fisher` wrote
    strength: float | None = None  # null: off


@dataclass(frozen=True)
class L2SpConfig:
    """The same with a Fisher information of 1: the distance from the base's weights."""

    strength: float | None = None  # null: off


@dataclass(frozen=True)
class KlConfig:
    """KL(base || model) of next-token distributions."""

    coefficient: float | None = None  # null: off
    # The tokens that count: supervised ones by their weights, or all alike.
    on: Literal["supervised", "all"] = "supervised"


@dataclass(frozen=True)
class RegularizationConfig:
    """Terms that are added to the loss of a run that starts from a checkpoint."""

    ewc: EwcConfig = field(default_factory=EwcConfig)
    l2_sp: L2SpConfig = field(default_factory=L2SpConfig)
    kl: KlConfig = field(default_factory=KlConfig)

    def __post_init__(self) -> None:
        positive("regularization.ewc.strength", self.ewc.strength)
        positive("regularization.l2_sp.strength", self.l2_sp.strength)
        positive("regularization.kl.coefficient", self.kl.coefficient)
        not_empty("regularization.ewc.fisher", self.ewc.fisher)
        if self.ewc.strength is not None and self.ewc.fisher is None:
            refuse(
                "regularization.ewc.fisher",
                None,
                "a folder with the base's Fisher information, since regularization.ewc.strength "
                "is set",
                "Make one: torchprime fisher --config-name NAME --out DIR. Without one, set "
                "regularization.l2_sp.strength instead.",
            )
        if self.ewc.fisher is not None and self.ewc.strength is None:
            refuse(
                "regularization.ewc.strength",
                None,
                "a number above 0, since regularization.ewc.fisher is set",
                "Set regularization.ewc.strength=0.5, or regularization.ewc.fisher=null.",
            )
        if self.ewc.strength is not None and self.l2_sp.strength is not None:
            refuse(
                "regularization.l2_sp.strength",
                self.l2_sp.strength,
                "null, since regularization.ewc.strength is set: both hold the same weights",
                "Set one of the two to null.",
            )

    @property
    def penalty(self) -> tuple[Literal["ewc", "l2_sp"], float] | None:
        """The penalty on the distance from the base's weights, and its strength."""
        if self.ewc.strength is not None:
            return "ewc", self.ewc.strength
        if self.l2_sp.strength is not None:
            return "l2_sp", self.l2_sp.strength
        return None

    @property
    def enabled(self) -> bool:
        """Return True if the loss has a term that needs the base's weights."""
        return bool(self._switches())

    def describe(self) -> str:
        """Return the terms with their factors, for the log; "" for none."""
        penalty = [] if self.penalty is None else ["{} {:g}".format(*self.penalty)]
        kl = self.kl.coefficient
        divergence = [] if kl is None else [f"kl {kl:g} on {self.kl.on} tokens"]
        return ", ".join(penalty + divergence)

    def runs_base(self, *, adapter: bool) -> bool:
        """Return True if a step runs a copy of the base; under an adapter it is the model's own."""
        return self.kl.coefficient is not None and not adapter

    def holds_base(self, *, adapter: bool) -> bool:
        """Return True if devices hold the base's weights beside the trained ones."""
        return self.penalty is not None or self.runs_base(adapter=adapter)

    def check_run(self, adapter: AdapterConfig, has_base: bool) -> None:
        """Refuse terms that make no sense for a run.

        Args:
            has_base: true if the run starts from a checkpoint.
        """
        if self.enabled and not has_base:
            refuse(
                "model.pretrained_model",
                None,
                "the base that the regularization section holds the run near",
                f"Name a checkpoint, or set {' '.join(f'{key}=null' for key in self._switches())}.",
            )
        if self.penalty is not None and adapter.enabled:
            name, strength = self.penalty
            refuse(
                f"regularization.{name}.strength",
                strength,
                "null, since the run trains an adapter: the base's weights are frozen, so their "
                "distance from the base is 0",
                f"Set regularization.{name}.strength=null, or adapter=none.",
            )

        if self.kl.coefficient is not None and adapter.enabled and adapter.modules_to_train:
            refuse(
                "regularization.kl.coefficient",
                self.kl.coefficient,
                "null, since adapter.modules_to_train changes weights of the base: the model "
                "without its adapter is another one than the base",
                "Set adapter.modules_to_train=[], or regularization.kl.coefficient=null.",
            )

    def _switches(self) -> list[str]:
        """Return the keys that turn the terms on."""
        penalty = [] if self.penalty is None else [f"regularization.{self.penalty[0]}.strength"]
        kl = [] if self.kl.coefficient is None else ["regularization.kl.coefficient"]
        return penalty + kl
