"""The sections `task.optimizer` and `task.lr_scheduler`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from torchprime.config.checks import at_least, fraction, not_empty, positive, refuse
from torchprime.errors import ConfigError

OptimizerName = Literal["adamw", "adafactor", "muon", "lion", "sgd", "adamw_8bit"]
ScheduleName = Literal[
    "linear", "cosine", "constant", "wsd", "inverse_sqrt", "cosine_with_restarts", "exponential"
]
# The methods that have a setting; the others refuse it.
WITH_MOMENTUM = ("muon", "sgd")
WITH_EPS = ("adamw", "adafactor", "muon", "adamw_8bit")


@dataclass(frozen=True)
class MuonConfig:
    """Settings of Muon; everything but the matrices of layers gets AdamW's update."""

    # original: x sqrt(max(1, rows / columns)); match_rms_adamw: x 0.2 sqrt(max(rows, columns))
    adjust_lr: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    adamw_lr_factor: float = 1.0
    steps: int = 5  # Newton-Schulz iterations

    def __post_init__(self) -> None:
        positive("task.optimizer.muon.adamw_lr_factor", self.adamw_lr_factor)
        at_least("task.optimizer.muon.steps", self.steps, 1)


@dataclass(frozen=True)
class GroupConfig:
    """Settings of the parameters that a pattern covers: a name, `*` for one part of it, or the name
    of a module. The first group that covers a parameter decides."""

    pattern: str
    lr_factor: float = 1.0
    weight_decay: float | None = None  # None: the optimizer's own; a number: also of norms, biases
    frozen: bool = False

    def __post_init__(self) -> None:
        key = f"task.optimizer.groups (pattern {self.pattern!r})"
        not_empty("task.optimizer.groups.pattern", self.pattern)
        positive(f"{key}.lr_factor", self.lr_factor)
        at_least(f"{key}.weight_decay", self.weight_decay, 0)
        if self.frozen and (self.lr_factor != 1 or self.weight_decay is not None):
            refuse(
                f"{key}.frozen",
                True,
                "false, since the group has an lr_factor or a weight_decay, which frozen weights "
                "do not need",
                "Take them out, or set frozen=false.",
            )


@dataclass(frozen=True)
class OptimizerConfig:
    name: OptimizerName = "adamw"
    learning_rate: float = 1e-5
    betas: tuple[float, float] | None = None  # None: the method's own
    eps: float | None = None  # None: the method's own, 1e-30 for adafactor, else 1e-8
    weight_decay: float = 0.0
    momentum: float | None = None  # None: the method's own, 0.95 for muon, 0.9 for sgd
    nesterov: bool | None = None  # None: the method's own, true for muon, false for sgd
    muon: MuonConfig = field(default_factory=MuonConfig)
    groups: list[GroupConfig] = field(default_factory=list)
    # fp32 copies of bf16 weights: without them small updates are rounded away.
    master_weights: bool = True

    def __post_init__(self) -> None:
        positive("task.optimizer.learning_rate", self.learning_rate)
        for i, beta in enumerate(self.betas or ()):
            fraction(f"task.optimizer.betas[{i}]", beta, one_allowed=False)
        positive("task.optimizer.eps", self.eps)
        at_least("task.optimizer.weight_decay", self.weight_decay, 0)
        fraction("task.optimizer.momentum", self.momentum, one_allowed=False)
        self._check_effect()
        patterns = [group.pattern for group in self.groups]
        for number, pattern in enumerate(patterns):
            if pattern in patterns[:number]:
                refuse(
                    f"task.optimizer.groups[{number}].pattern",
                    pattern,
                    "another than before: the first group that covers a parameter decides",
                    "Take one of the two groups out.",
                )

    def _check_effect(self) -> None:
        """Refuse keys that the method does not have."""
        for key, methods in (
            ("momentum", WITH_MOMENTUM),
            ("nesterov", WITH_MOMENTUM),
            ("eps", WITH_EPS),
        ):
            if getattr(self, key) is not None and self.name not in methods:
                refuse(
                    f"task.optimizer.{key}",
                    getattr(self, key),
                    f"null, since {self.name} has no such setting ({', '.join(methods)} have it)",
                    f"Set task.optimizer.{key}=null, or another task.optimizer.name.",
                )
        if self.nesterov and self.momentum == 0:
            refuse(
                "task.optimizer.nesterov",
                True,
                "false, since task.optimizer.momentum is 0",
                "Set task.optimizer.momentum=0.9, or task.optimizer.nesterov=false.",
            )
        if self.name != "muon" and self.muon != MuonConfig():
            changed = [k for k, v in vars(MuonConfig()).items() if v != getattr(self.muon, k)]
            key = f"task.optimizer.muon.{changed[0]}"
            refuse(
                key,
                getattr(self.muon, changed[0]),
                f"{getattr(MuonConfig(), changed[0])!r}, since task.optimizer.name is {self.name}",
                f"Take {key} out, or set task.optimizer.name=muon.",
            )


@dataclass(frozen=True)
class SchedulerConfig:
    """Linear warm-up, then decay of this shape to `min_lr_ratio` of the peak."""

    name: ScheduleName = "linear"
    warmup_steps: int | None = None
    warmup_ratio: float | None = None
    decay_steps: int | None = None  # of wsd: the updates at the end in which the rate falls
    decay_ratio: float | None = None
    decay_shape: Literal["linear", "cosine", "sqrt"] | None = None  # None: linear
    cycles: int | None = None  # of cosine_with_restarts; None: 1
    min_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        self._check_length("warmup")
        self._check_length("decay")
        fraction("task.lr_scheduler.min_lr_ratio", self.min_lr_ratio)
        at_least("task.lr_scheduler.cycles", self.cycles, 1)
        if self.name == "exponential" and not self.min_lr_ratio:
            refuse(
                "task.lr_scheduler.min_lr_ratio",
                self.min_lr_ratio,
                "more than 0, since task.lr_scheduler.name=exponential rises from there by equal "
                "factors",
                "Set task.lr_scheduler.min_lr_ratio=1e-6, for example.",
            )
        at_least("task.lr_scheduler.decay_steps", self.decay_steps, 1)
        if self.name == "wsd" and self.decay_steps is None and self.decay_ratio is None:
            raise ConfigError(
                "task.lr_scheduler.decay_steps and task.lr_scheduler.decay_ratio: given null and "
                "null, expected one of the two, since task.lr_scheduler.name is wsd. Set "
                "task.lr_scheduler.decay_ratio=0.1, for example."
            )
        for key, name in (
            ("decay_steps", "wsd"),
            ("decay_ratio", "wsd"),
            ("decay_shape", "wsd"),
            ("cycles", "cosine_with_restarts"),
        ):
            if getattr(self, key) is not None and self.name != name:
                refuse(
                    f"task.lr_scheduler.{key}",
                    getattr(self, key),
                    f"null, since task.lr_scheduler.name is {self.name}",
                    f"Set task.lr_scheduler.{key}=null, or task.lr_scheduler.name={name}.",
                )

    def _check_length(self, part: str) -> None:
        """Check a number of updates, which is given directly or as a share of all."""
        steps_key, ratio_key = f"task.lr_scheduler.{part}_steps", f"task.lr_scheduler.{part}_ratio"
        steps, ratio = getattr(self, f"{part}_steps"), getattr(self, f"{part}_ratio")
        if steps is not None and ratio is not None:
            raise ConfigError(
                f"{steps_key} and {ratio_key}: given {steps} and {ratio}, "
                f"expected at most one of the two. Add {ratio_key}=null or {steps_key}=null."
            )
        at_least(steps_key, steps, 0)
        fraction(ratio_key, ratio)
