"""Strict conversion of a composed config (nested dict or DictConfig) to a TrainConfig.

The annotations of the dataclasses drive the conversion, so each key is defined in one place only.
There are two implicit conversions only: a whole number to a float, and text to a float if YAML 1.1
reads it as text because it has no dot ("1e-5").
"""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, OmegaConf

from torchprime.config.checks import not_empty, refuse
from torchprime.config.other_names import advice_for
from torchprime.config.paths import PathRule, checked_path
from torchprime.config.schema import AXES, AxisSpec, TrainConfig
from torchprime.errors import ConfigError

_FLOAT_TEXT = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)[eE][+-]?\d+")


def load_config(composed: Mapping[str, Any] | DictConfig) -> TrainConfig:
    """Turn a composed config into a checked TrainConfig, or raise an error that names the fault."""
    if isinstance(composed, DictConfig):
        missing = OmegaConf.missing_keys(composed)
        if missing:
            raise ConfigError(missing_message(sorted(missing)))
        composed = typing.cast(
            Mapping[str, Any], OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
        )
    return _section(TrainConfig, composed, "")


def missing_message(keys: list[str]) -> str:
    fixes = " ".join(f"{key}=..." for key in keys)
    return (
        f"{', '.join(keys)}: given nothing (???), expected a value. Add {fixes} to the command "
        "line, or the value to your YAML."
    )


def known_keys(cls: type[Any] = TrainConfig, prefix: str = "") -> list[str]:
    """Return every dotted name in the schema, sections included."""
    keys = []
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        name = f"{prefix}{spec.name}"
        keys.append(name)
        if dataclasses.is_dataclass(hints[spec.name]):
            keys += known_keys(hints[spec.name], f"{name}.")
    return keys


def free_sections() -> list[str]:
    """Return the dotted names of the dicts whose keys are the user's own."""
    return [
        "dataset.columns",
        "model.architecture",
        "sharding.parameters",
        "sharding.activations",
    ]


def schema_defaults(cls: type[Any] = TrainConfig) -> dict[str, Any]:
    """Return every key with its default, `???` if it has none: the base of every config."""
    defaults: dict[str, Any] = {}
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[spec.name]):
            defaults[spec.name] = schema_defaults(hints[spec.name])
        elif spec.default_factory is not dataclasses.MISSING:
            defaults[spec.name] = spec.default_factory()
        elif spec.default is dataclasses.MISSING:
            defaults[spec.name] = "???"
        else:
            value = spec.default
            defaults[spec.name] = list(value) if isinstance(value, tuple) else value
    return defaults


def flat_keys(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys with their values, of nested sections."""
    for key, item in config.items():
        if isinstance(item, Mapping):
            yield from flat_keys(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the candidate closest to a misspelt name; the last part of a dotted name decides. A
    key of the same section that begins so is the one."""
    # A section above the misspelt key is never the intended name.
    candidates = [key for key in candidates if not name.startswith(f"{key}.")]
    same_leaf = [key for key in candidates if key.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    section, _, leaf = name.rpartition(".")
    longer = [key for key in candidates if section and key.startswith(f"{section}.{leaf}")]
    if len(longer) == 1:
        return longer[0]
    pools = [same_leaf, candidates] if same_leaf else [candidates]
    for pool, cutoff in zip(pools, (0.3 if same_leaf else 0.6, 0.6), strict=False):
        close = difflib.get_close_matches(name, pool, n=1, cutoff=cutoff)
        if close:
            return close[0]
    leaves = {key.rsplit(".", 1)[-1]: key for key in reversed(candidates)}
    close = difflib.get_close_matches(name.rsplit(".", 1)[-1], leaves, n=1, cutoff=0.75)
    return leaves[close[0]] if close else None


def unknown_key_message(key: str, given: object) -> str:
    """Return the message for a key that is in no schema."""
    if (advice := advice_for(key)) is not None:
        return f"{key}: given {given!r}, but there is no such key. {advice}"
    close = nearest(key, known_keys())
    section = key.rsplit(".", 1)[0] if "." in key else ""
    if close:
        advice = f"Did you mean {close}?"
    elif section in known_keys():
        inside = [k.rsplit(".", 1)[1] for k in known_keys() if k.rpartition(".")[0] == section]
        advice = f"Keys of {section}: {', '.join(inside)}."
    else:
        top = [k for k in known_keys() if "." not in k]
        advice = f"Top-level keys: {', '.join(top)}."
    return f"{key}: given {given!r}, but there is no such key. {advice}"


def _section(cls: type[Any], given: Any, key: str) -> Any:
    prefix = f"{key}." if key else ""
    if not isinstance(given, Mapping):
        inside = ", ".join(f.name for f in dataclasses.fields(cls))
        fix = f"Set one of its keys: {inside}." if key else "Start from an existing config."
        refuse(key or "the config", given, "a section with keys", fix)
    hints = typing.get_type_hints(cls, include_extras=True)
    for name, value in given.items():
        if name not in hints:
            raise ConfigError(unknown_key_message(f"{prefix}{name}", value))
    values = {}
    for spec in dataclasses.fields(cls):
        full, wanted = f"{prefix}{spec.name}", hints[spec.name]
        if spec.name in given:
            values[spec.name] = _value(wanted, given[spec.name], full)
        elif dataclasses.is_dataclass(wanted):
            values[spec.name] = _section(typing.cast(type, wanted), {}, full)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise ConfigError(missing_message([full]))
    return cls(**values)


def checked_value(wanted: Any, given: Any, key: str) -> Any:
    """Convert one value to its annotation, or raise a ConfigError."""
    return _value(wanted, given, key)


def _value(wanted: Any, given: Any, key: str) -> Any:
    """Convert one value to its annotation."""
    origin = get_origin(wanted)
    if dataclasses.is_dataclass(wanted):
        return _section(typing.cast(type, wanted), given, key)
    if wanted == AxisSpec:
        return _axis_spec(given, key)
    if origin is Annotated:
        text, rule = get_args(wanted)
        return _path(_scalar(text, given, key), rule, key)
    if origin in (Union, types.UnionType):
        if given is None:
            return None
        (inner,) = (arg for arg in get_args(wanted) if arg is not type(None))
        return _value(inner, given, key)
    if origin is Literal:
        return _choice(get_args(wanted), given, key)
    if origin is tuple:
        return _tuple(get_args(wanted), given, key)
    if origin is list:
        (item,) = get_args(wanted)
        if dataclasses.is_dataclass(item):
            return _sections(typing.cast(type, item), given, key)
        return _list(item, given, key)
    if origin is dict:
        return _mapping(get_args(wanted)[1], given, key)
    return _scalar(wanted, given, key)


def _path(given: str, rule: PathRule, key: str) -> str:
    not_empty(key, given)
    return checked_path(key, given, rule)


def _choice(options: tuple[str, ...], given: Any, key: str) -> str:
    if given in options:
        return given
    close = nearest(str(given), options)
    fix = f"Did you mean {key}={close}?" if close else f"Write {key}={options[0]}, for example."
    refuse(key, given, f"one of {', '.join(options)}", fix)


def _list(item: Any, given: Any, key: str) -> list[Any]:
    if not isinstance(given, list | tuple):
        refuse(key, given, "a list", f"Write {key}=[{given}].")
    return [_value(item, value, f"{key}[{i}]") for i, value in enumerate(given)]


def _tuple(items: tuple[Any, ...], given: Any, key: str) -> tuple[Any, ...]:
    if not isinstance(given, list | tuple) or len(given) != len(items):
        example = ",".join("0.9" for _ in items)
        refuse(key, given, f"a list of {len(items)} numbers", f"Write {key}=[{example}].")
    return tuple(
        _value(item, value, f"{key}[{i}]")
        for i, (item, value) in enumerate(zip(items, given, strict=True))
    )


def _sections(item: Any, given: Any, key: str) -> list[Any]:
    """Convert a list of sections of the same kind."""
    if not isinstance(given, list | tuple):
        refuse(key, given, "a list of sections", f"Write it in YAML, each item of {key} with a -.")
    return [_section(item, value, f"{key}[{place}]") for place, value in enumerate(given)]


def _mapping(wanted: Any, given: Any, key: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        refuse(
            key, given, "a mapping of names to values", f"Write it as a YAML section under {key}."
        )
    for name in given:
        if not isinstance(name, str):
            refuse(key, name, "names that are text", "Put the name in quotes.")
    if wanted is Any:
        return {name: _plain_copy(value) for name, value in given.items()}
    return {name: _value(wanted, value, f"{key}['{name}']") for name, value in given.items()}


def _plain_copy(value: Any) -> Any:
    """Return a copy of a free-form value; YAML's text for 1e-5 becomes the number."""
    if isinstance(value, Mapping):
        return {name: _plain_copy(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_copy(item) for item in value]
    if isinstance(value, str) and _FLOAT_TEXT.fullmatch(value):
        return float(value)
    return value


def _axis_spec(given: Any, key: str) -> AxisSpec:
    example = "Write [tensor, fsdp], or [[data, fsdp], null] to split one dim over two axes."
    if not isinstance(given, list | tuple):
        refuse(key, given, "a list with one entry per dim", example)
    spec: AxisSpec = []
    for i, entry in enumerate(given):
        if entry is None:
            spec.append(None)
        elif isinstance(entry, list | tuple):
            spec.append([_choice(AXES, name, f"{key}[{i}]") for name in entry])
        elif isinstance(entry, str):
            spec.append(_choice(AXES, entry, f"{key}[{i}]"))
        else:
            refuse(f"{key}[{i}]", entry, "an axis, a list of axes or null", example)
    return spec


def _scalar(wanted: type, given: Any, key: str) -> Any:
    if wanted is bool and isinstance(given, bool):
        return given
    if wanted is int and isinstance(given, int) and not isinstance(given, bool):
        return given
    if wanted is float:
        if isinstance(given, int | float) and not isinstance(given, bool):
            return float(given)
        if isinstance(given, str) and _FLOAT_TEXT.fullmatch(given.strip()):
            return float(given)
    if wanted is str and isinstance(given, str):
        return given
    expected, fix = {
        bool: ("true or false", f"Write {key}=true."),
        int: ("a whole number", f"Write {key}=100."),
        float: ("a number", f"Write {key}=0.1."),
        str: ("text", "In a YAML file put what is meant as text in quotes: YAML reads 1e3, 007 and "
                      "on as numbers and true."),
    }[wanted]  # fmt: skip
    kind = {type(None): "null", str: "text", bool: "a truth value", int: "a whole number"}.get(
        type(given), f"a {type(given).__name__}"
    )
    refuse(key, given, f"{expected}, not {kind}", fix)
