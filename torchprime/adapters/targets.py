"""The choice of layers: name patterns to linear layers of a model, checked."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from torchprime.adapters.spec import ALL_LINEAR, AdapterSpec
from torchprime.errors import ConfigError

# The output projection is multiplied chunk by chunk by the loss, not called as a layer.
_OUTPUT = "lm_head"
LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


def target_names(model: nn.Module, spec: AdapterSpec) -> list[str]:
    """Return the names of the linear layers that get an adapter, in the model's order.

    A pattern matches a whole name (`model.layers.*.q_proj`) or its last parts (`q_proj`), as in
    PEFT's `target_modules`.

    Raises:
        ConfigError: a pattern that matches nothing, a tied or adapted output projection, a layer
            number that the model doesn't have, or a rank above a layer's dims.
    """
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    chosen: set[str] = set()
    for pattern in spec.targets:
        found = _matching(pattern, linears)
        if not found:
            raise ConfigError(_nothing_found(pattern, list(linears)))
        chosen |= found
    if _OUTPUT in chosen:
        raise ConfigError(
            f"adapter.targets: given {_OUTPUT}, which the loss multiplies chunk by chunk, so it "
            f"can't have an adapter. Train it whole: adapter.modules_to_train=[{_OUTPUT}]."
        )
    chosen = _in_layers(chosen, spec.layers)
    names = [name for name in linears if name in chosen]
    for name in names:
        _check_rank(name, linears[name], spec.rank)
    return names


def _matching(pattern: str, names: dict[str, nn.Linear]) -> set[str]:
    if pattern == ALL_LINEAR:
        return {name for name in names if name != _OUTPUT}
    return {name for name in names if _matches(pattern, name)}


def _matches(pattern: str, name: str) -> bool:
    """Return True if the pattern matches the whole name or its last parts."""
    return fnmatchcase(name, pattern) or name.endswith(f".{pattern}")


def _near(pattern: str, names: Sequence[str]) -> list[str]:
    """Return the last parts of names that are nearest to the pattern's; [] if none is near."""
    last_parts = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    wanted = pattern.rpartition(".")[2]
    return difflib.get_close_matches(wanted, last_parts, n=3, cutoff=0.4)


def _nothing_found(pattern: str, names: Sequence[str]) -> str:
    if pattern == _OUTPUT:
        return (
            f"adapter.targets: given {_OUTPUT}, but this model's output projection is tied to "
            "embed_tokens. Leave it out, or train the embedding whole: "
            "adapter.modules_to_train=[embed_tokens]."
        )
    near = _near(pattern, names) or dict.fromkeys(name.rpartition(".")[2] for name in names)
    return (
        f"adapter.targets: given {pattern!r}, which matches no linear layer of the model. Expected "
        f"{ALL_LINEAR}, or names such as {', '.join(near)}."
    )


def _in_layers(names: set[str], layers: tuple[int, ...] | None) -> set[str]:
    if layers is None:
        return names
    numbers = {name: int(m[1]) for name in names if (m := LAYER_NUMBER.search(name))}
    missing = sorted(set(layers) - set(numbers.values()))
    if missing:
        most = max(numbers.values(), default=-1)
        raise ConfigError(
            f"adapter.layers: given {missing[0]}, expected numbers from 0 to {most}, the layers "
            "with a target."
        )
    return {name for name, number in numbers.items() if number in layers}


def _check_rank(name: str, linear: nn.Linear, rank: int) -> None:
    most = min(linear.in_features, linear.out_features)
    if rank > most:
        raise ConfigError(
            f"adapter.rank: given {rank}, expected at most {most}, the smaller dim of {name} "
            f"[{linear.out_features}, {linear.in_features}]: above it the adapter has more numbers "
            "than the weight."
        )


def trained_modules(model: nn.Module, wanted: Sequence[str]) -> list[str]:
    """Return the names of the modules that are trained whole.

    Raises:
        ConfigError: a name that matches no module with weights.
    """
    names = [name for name, module in model.named_modules() if list(module.parameters())]
    chosen: set[str] = set()
    for pattern in wanted:
        found = {name for name in names if name and _matches(pattern, name)}
        if not found:
            near = _near(pattern, names)
            raise ConfigError(
                f"adapter.modules_to_train: given {pattern!r}, which is no module of the model. "
                f"Expected names such as {', '.join(near or ['embed_tokens', 'lm_head', 'norm'])}."
            )
        chosen |= found
    return [name for name in names if name in chosen]
