"""Factory of graders: a section of the eval config becomes a function from a sample to a grade.

    {name: format_pass, kind: regex, pattern: "^Arr"}  ->  make_grader  ->  Sample -> 1.0

Each kind is a builder, a plain function whose keyword arguments are the kind's options. Its
signature is the only place where an option is named. Names, types and defaults are checked against
it here; constraints that a type can't express are checked in the builder. So an error is one
message before any weight is read, and a grader that exists can grade.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, Literal

from torchprime.config.load import checked_value, nearest
from torchprime.errors import ConfigError
from torchprime.evaluation.graders.answers import (
    gsm8k_answer,
    gsm8k_format,
    think_answer,
    think_answer_value,
)
from torchprime.evaluation.graders.custom import python_grader
from torchprime.evaluation.graders.formulas import math_grader
from torchprime.evaluation.graders.json_form import json_grader, json_schema_grader
from torchprime.evaluation.graders.refusals import refusal
from torchprime.evaluation.graders.samples import Grader, Sample
from torchprime.evaluation.graders.text import (
    contains,
    exact_match,
    length,
    non_empty,
    regex_grader,
    repetition,
    stopped,
)

__all__ = ["KINDS", "Grader", "Sample", "LOWER_IS_BETTER", "MEASURES", "make_grader", "options_of"]

# Each builder takes the key of its section, for messages, and the kind's options.
KINDS: dict[str, Callable[..., Grader]] = {
    "exact_match": exact_match,
    "contains": contains,
    "regex": regex_grader,
    "gsm8k_answer": gsm8k_answer,
    "gsm8k_format": gsm8k_format,
    "think_answer": think_answer,
    "think_answer_value": think_answer_value,
    "math": math_grader,
    "json": json_grader,
    "json_schema": json_schema_grader,
    "non_empty": non_empty,
    "length": length,
    "repetition": repetition,
    "refusal": refusal,
    "stopped": stopped,
    "python": python_grader,
}


MEASURES = frozenset({"length", "repetition"})  # kinds whose values are no passes and fails
LOWER_IS_BETTER = frozenset({"refusal", "repetition"})  # unless a run's rules say otherwise


def options_of(kind: str) -> dict[str, inspect.Parameter]:
    """Return the options of a kind by name, with their defaults."""
    parameters = inspect.signature(KINDS[kind]).parameters
    return {name: parameter for name, parameter in parameters.items() if name != "key"}


def make_grader(kind: str, *, key: str = "grader", **options: Any) -> Grader:
    """Build the grader of one section of the config.

    Args:
        kind: one of `KINDS`.
        key: where the section stands, such as `eval.graders[0]`; messages begin with it.
        options: the kind's options, as YAML gives them.

    Raises:
        ConfigError: no such kind or option, a value it cannot have, or one that is missing.
    """
    kind = checked_value(Literal[tuple(KINDS)], kind, f"{key}.kind")
    known = options_of(kind)
    for name, given in options.items():
        if name not in known:
            raise ConfigError(_unknown_option(kind, f"{key}.{name}", name, given))
    for name, parameter in known.items():
        if parameter.default is inspect.Parameter.empty and name not in options:
            raise ConfigError(
                f"{key}.{name}: given nothing, expected a value, since graders of kind {kind} "
                f"need one. Add {name}: ... below kind: {kind}."
            )
    hints = typing.get_type_hints(KINDS[kind])
    checked = {
        name: given if hints[name] is Any else checked_value(hints[name], given, f"{key}.{name}")
        for name, given in options.items()
    }
    return KINDS[kind](key=key, **checked)


def _unknown_option(kind: str, key: str, name: str, given: object) -> str:
    known = options_of(kind)
    close = nearest(name, known)
    advice = f"Did you mean {close}? " if close else ""
    listed = f"Its options: {', '.join(known)}." if known else f"Take {name} out: it has none."
    return f"{key}: given {given!r}, but kind {kind} has no such option. {advice}{listed}"
