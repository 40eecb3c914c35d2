"""Parameter groups by name: learning-rate factor, weight decay, frozen weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchprime.adapters.apply import freeze
from torchprime.errors import ConfigError
from torchprime.sharding import matches
from torchprime.training.optim.optimizer import Optimizer, Parameter, Slot, decays

KEY = "task.optimizer.groups"


class Group(NamedTuple):
    """The settings of the parameters that a pattern covers.

    Attributes:
        pattern: of a parameter's name, or of a module's, which covers everything in it.
        weight_decay: also of norms and biases; None leaves the optimizer's own.
    """

    pattern: str
    lr_factor: float = 1.0
    weight_decay: float | None = None
    frozen: bool = False

    def covers(self, name: str) -> bool:
        """Return True if the pattern is the name of a parameter, or of a module around it."""
        parts = name.split(".")
        return matches(self.pattern, ".".join(parts[: len(self.pattern.split("."))]))


def group_of(groups: Iterable[Group], name: str) -> Group | None:
    """Return the first group that covers a parameter."""
    return next((group for group in groups if group.covers(name)), None)


def freeze_groups(model: nn.Module, groups: Sequence[Group]) -> None:
    """Freeze the parameters of the groups that say so, in place. They stay part of checkpoints and
    exports.

    Raises:
        ConfigError: a pattern that covers no trained parameter; or nothing is left to train.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    others = [name for name, p in model.named_parameters() if not p.requires_grad]
    for number, group in enumerate(groups):
        if not any(group.covers(name) for name in trained):
            _refuse(f"{KEY}[{number}].pattern", group, trained, others)
    found = {name: group_of(groups, name) for name in trained}
    frozen = [name for name, group in found.items() if group is not None and group.frozen]
    if groups and len(frozen) == len(trained):
        raise ConfigError(
            f"{KEY}: given groups that freeze all {len(trained):,} parameters, expected at least "
            "one to train. Narrow a pattern, or put a group with frozen=false before it."
        )
    freeze(model, frozen)


def _refuse(key: str, group: Group, trained: Sequence[str], others: Sequence[str]) -> None:
    """Raise the error for a pattern that covers no trained parameter."""
    given = f"{key}: given {group.pattern!r}"
    if any(group.covers(name) for name in others):
        raise ConfigError(
            f"{given}, which covers weights of the adapter's base only, expected trained "
            f"parameters, such as {trained[0]}. The base is frozen anyway."
        )
    modules = {".".join(n.split(".")[:end]) for n in trained for end in range(1, n.count(".") + 2)}
    near = difflib.get_close_matches(group.pattern, sorted(modules), n=3, cutoff=0.3)
    raise ConfigError(
        f"{given}, which covers no parameter, expected the name of one or of a module, `*` for one "
        f"part of it. The nearest: {', '.join(near or trained[:3])}."
    )


class Grouped:
    """An optimizer with the learning-rate factors and weight decays of groups."""

    def __init__(self, optimizer: Optimizer, groups: Sequence[Group]) -> None:
        self.optimizer, self.groups = optimizer, tuple(groups)
        self.weight_decay = optimizer.weight_decay

    def slots(self, parameter: Parameter) -> dict[str, Slot]:
        return self.optimizer.slots(parameter)

    def update(
        self,
        parameter: Parameter,
        weight: Tensor,
        gradient: Tensor,
        state: Mapping[str, Tensor],
        lr: Tensor,
        step: Tensor,
    ) -> dict[str, Tensor]:
        found = [(name, group_of(self.groups, name)) for name in parameter.names]
        factor = _by_layer([1.0 if g is None else g.lr_factor for _, g in found], weight)
        rates = [
            g.weight_decay
            if g is not None and g.weight_decay is not None
            else self.weight_decay * decays(name)
            for name, g in found
        ]
        parameter = parameter._replace(weight_decay=_by_layer(rates, weight))
        return self.optimizer.update(parameter, weight, gradient, state, lr * factor, step)


def _by_layer(values: Sequence[float], weight: Tensor) -> float | Tensor:
    """Return the value of all layers, or values that are broadcast along a stack of layers."""
    if len(set(values)) == 1:
        return float(values[0])
    each = [torch.full((), value, device=weight.device) for value in values]
    return torch.stack(each).view(-1, *(1,) * (weight.dim() - 1))


def grouped(optimizer: Optimizer, groups: Sequence[Group]) -> Optimizer:
    """Return the optimizer with the groups' settings; itself if they only freeze."""
    plain = all(group.lr_factor == 1 and group.weight_decay is None for group in groups)
    return optimizer if plain else Grouped(optimizer, groups)
