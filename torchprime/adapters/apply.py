"""`(model, spec) -> model`: the same model with adapted layers, all other weights frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from torchprime.adapters.lora import AdaptedLinear
from torchprime.adapters.spec import AdapterSpec
from torchprime.adapters.targets import target_names, trained_modules
from torchprime.errors import ConfigError

BASE = ".base_layer."


def apply_adapter(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Put adapters around the chosen linear layers and freeze every other weight, in place.

    Only parameters of adapters and of `modules_to_train` require a gradient afterwards. Values of
    new parameters are not set (`initial_values`).

    Returns:
        The names of the adapted layers.

    Raises:
        ConfigError: see `target_names` and `trained_modules`; or a layer that is both adapted and
            trained whole.
    """
    targets = target_names(model, spec)
    whole = trained_modules(model, spec.modules_to_train)
    both = [t for t in targets if any(t == w or t.startswith(f"{w}.") for w in whole)]
    if both:
        raise ConfigError(
            f"adapter.modules_to_train: {both[0]} is also in adapter.targets. Expected each layer "
            "in one of them: name other modules, or narrow adapter.targets."
        )
    model.requires_grad_(False)
    for name in whole:
        model.get_submodule(name).requires_grad_(True)
    for number, name in enumerate(targets):
        parent, _, last = name.rpartition(".")
        adapted = AdaptedLinear(model.get_submodule(name), spec, number)
        setattr(model.get_submodule(parent), last, adapted)
    return targets


def base_name(name: str) -> str:
    """Return a parameter's name in the model without adapters."""
    return name.replace(BASE, ".")


def freeze(model: nn.Module, names: Iterable[str]) -> None:
    """Freeze parameters that are nevertheless part of checkpoints and exports, in place."""
    for name in names:
        owner, _, last = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        module.frozen_but_saved = getattr(module, "frozen_but_saved", frozenset()) | {last}
        model.get_parameter(name).requires_grad_(False)


def saved(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of checkpoints and exports, by name: those that training changes, and
    those that `freeze` froze."""
    return {
        f"{owner}.{last}" if owner else last: parameter
        for owner, module in model.named_modules()
        for last, parameter in module.named_parameters(recurse=False)
        if parameter.requires_grad or last in getattr(module, "frozen_but_saved", ())
    }


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that training changes, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def is_adapted(model: nn.Module) -> bool:
    """Return True if a model has adapters."""
    return any(isinstance(module, AdaptedLinear) for module in model.modules())


@contextmanager
def without_adapters(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Make layers compute what the base computes, inside the context."""
    adapted = [m for layer in layers for m in layer.modules() if isinstance(m, AdaptedLinear)]
    try:
        for module in adapted:
            module.off = True
        yield
    finally:
        for module in adapted:
            module.off = False
