"""Conversion of an override as typed to the spelling with the intended meaning in Hydra.

Hydra's grammar makes numbers of `run_name=1e3`, and stops at the `~`, `#`, `=` or `(` of a path. A
key of ours that takes text gets exactly the typed text, so such a value is quoted before Hydra
parses it. `null`, lists, interpolations and quoted values are left to Hydra.
"""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from torchprime.config.checks import refuse
from torchprime.config.schema import TrainConfig

OWN_KEYS = re.compile(r"dataset\.(columns|template_options)[.=]")  # every key is the user's own
TEXT_SECTION = "dataset.columns."  # every value in it is a text
_OVERRIDE = re.compile(r"(\+{0,2})([\w.]+)=(.*)", re.DOTALL)
_ESCAPED = re.compile(r"\\[\\()\[\]{}:=, \t]")  # written by a user who knows Hydra's grammar
_PLAIN = re.compile(r"[A-Za-z_/][\w/.:@%+-]*", re.ASCII)
_VALUES = ("null", "true", "false", "nan", "inf")
_SWEEP = re.compile(r"(choice|range|interval|glob|shuffle|sort|tag|str|int|float|bool|json_str)\(")
_RUN_FOLDER = (
    "A run's folder is <output_dir>/<run_name>. Set output_dir=FOLDER run_name=NAME instead."
)
# Settings that Hydra users expect, and advice for each, by the beginning of the key.
HYDRA_ADVICE: Mapping[str, str] = {
    "hydra.run.": _RUN_FOLDER,
    "hydra.sweep.subdir": "A run of -m is named by the values that differ. To name it, sweep "
    "run_name, or write run_name=NAME_${seed}, for example.",
    "hydra.output_subdir": f"The config of a run is its folder's config.yaml. {_RUN_FOLDER}",
    "hydra.job.chdir": "A run stays in the folder where it was started. Leave it out.",
}
# Those that several runs have.
OF_SWEEPS = ("hydra/launcher", "hydra.launcher.", "hydra/sweeper", "hydra.sweeper.", "hydra.sweep.")


@cache
def text_keys() -> frozenset[str]:
    """Return the dotted names of the keys that take a text or a path."""
    return frozenset(_text_keys(TrainConfig, ""))


def _text_keys(cls: type[Any], prefix: str) -> list[str]:
    found = []
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            found += _text_keys(typing.cast(type, hint), f"{prefix}{name}.")
        elif _plain(hint) is str:
            found.append(f"{prefix}{name}")
    return found


def _plain(hint: Any) -> Any:
    """Return the type without null and without its annotations."""
    if get_origin(hint) is Annotated:
        return _plain(get_args(hint)[0])
    if get_origin(hint) is Union or type(hint).__name__ == "UnionType":
        kinds = [each for each in get_args(hint) if each is not type(None)]
        return _plain(kinds[0]) if len(kinds) == 1 else hint
    return hint


def in_full(override: str, *, many_runs: bool = False) -> str:
    """Return the override in Hydra's own spelling.

    Hydra adds no key unless told to, and in a mapping of columns or options every key is the user's
    own. A section has no value, but `resume=auto` means `resume.source=auto`.

    Args:
        many_runs: commas separate the values of several runs.
    """
    if override.startswith("resume="):
        override = f"resume.source={override.removeprefix('resume=')}"
    match = _OVERRIDE.fullmatch(override)
    if match and (match[2] in text_keys() or match[2].startswith(TEXT_SECTION)):
        override = f"{match[1]}{match[2]}={_as_text(match[3], many_runs)}"
    return f"++{override}" if OWN_KEYS.match(override) else override


def _as_text(value: str, many_runs: bool) -> str:
    """Quote a value, unless it is null, quoted, a list, an interpolation or a sweep."""
    text = value.strip()
    if not text or text.lower() == "null" or text == "???" or "${" in text:
        return value
    if text[0] in "'\"[{" or _SWEEP.match(text) or _ESCAPED.search(text):
        return value
    if "," in text:
        parts = text.split(",") if many_runs else []
        return ",".join(_as_text(part, many_runs=False) for part in parts) or value
    return quoted(text)


def quoted(text: str) -> str:
    """Return a text in the form that Hydra's grammar reads back, in double quotes if needed."""
    if _PLAIN.fullmatch(text) and text.lower() not in _VALUES:
        return text
    # A backslash is literal, unless it is before a quote or at the end of the text.
    escaped = re.sub(r'(\\*)"', lambda found: found[1] * 2 + '\\"', text)
    tail = escaped[len(escaped.rstrip("\\")) :]
    return f'"{escaped}{tail}"'


def refuse_hydras(key: str, given: str, *, uses_hydra: bool) -> None:
    """Refuse a setting of Hydra's own that would have no effect, with the alternative.

    Args:
        uses_hydra: True if hydra.main runs: for -m, --cfg and --info.

    Raises:
        ConfigError: naming the key.
    """
    for beginning, advice in HYDRA_ADVICE.items():
        if f"{key}.".startswith(beginning) or key.startswith(beginning):
            refuse(key, given, "a key of the run's config, not Hydra's own", advice)
    if not uses_hydra:
        expected = "a key of the run's config; Hydra's own do nothing in one run"
        fix = "For several runs add -m." if key.startswith(OF_SWEEPS) else "Leave it out."
        refuse(key, given, expected, fix)
