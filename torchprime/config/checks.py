"""Checks that the schema's sections use, and the form of their error messages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from typing import NoReturn

from torchprime.errors import ConfigError


def refuse(key: str, given: object, expected: str, fix: str) -> NoReturn:
    """Return a ConfigError in the standard form for a message about a value."""
    raise ConfigError(f"{key}: given {shown(given)}, expected {expected}. {fix}")


def shown(value: object) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return repr(value)


def at_least(key: str, value: float | None, least: float) -> None:
    if value is not None and not (value >= least and math.isfinite(value)):
        refuse(key, value, f"at least {least}", f"Set {key}={least} or more.")


def positive(key: str, value: float | None) -> None:
    if value is not None and not (value > 0 and math.isfinite(value)):
        refuse(key, value, "a number above 0", f"Set {key} to a number above 0.")


def fraction(key: str, value: float | None, *, one_allowed: bool = True) -> None:
    if value is None:
        return
    if not 0 <= value <= 1 or (value == 1 and not one_allowed):
        upper = "1" if one_allowed else "less than 1"
        refuse(key, value, f"a fraction from 0 to {upper}", f"Write 5% as {key}=0.05.")


def not_empty(key: str, value: str | None) -> None:
    if value is not None and not value.strip():
        refuse(key, value, "a name, or null for none", f"Give it a value or set {key}=null.")


def iso_date(key: str, value: str | None) -> None:
    if value is None:
        return
    try:
        date.fromisoformat(value)
    except ValueError:
        refuse(key, value, "a date such as 2026-11-29", f"Write it so, or set {key}=null.")


def special_tokens(key: str, texts: Sequence[str]) -> None:
    """Check texts that are each to become one token."""
    for place, text in enumerate(texts):
        where = f"{key}[{place}]"
        if not text.strip():
            expected = "a text that is more than white space"
            refuse(where, text, expected, f"Take it out, or write {key}=['<answer>'].")
        if text in texts[:place]:
            first = texts.index(text)
            refuse(where, text, f"each token once ({key}[{first}] is the same)", "Take one out.")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            refuse(where, text, "a text in UTF-8", "Write its characters, not single bytes.")


def some_source(section: str, hub: str | None, path: str | None) -> None:
    if hub is None and path is None:
        example = " Choose a dataset (dataset=gsm8k), or set" if section == "dataset" else " Set"
        raise ConfigError(
            f"{section}.hf_dataset_name and {section}.file_dataset_path: given null and null, "
            f"expected one of the two.{example} {section}.file_dataset_path=rows.jsonl."
        )


def one_source(section: str, hub: str | None, hub_config: str | None, path: str | None) -> None:
    """Refuse a hub name together with a file: the choice is never guessed."""
    hub_key, path_key = f"{section}.hf_dataset_name", f"{section}.file_dataset_path"
    not_empty(hub_key, hub)
    not_empty(path_key, path)
    if hub is not None and path is not None:
        raise ConfigError(
            f"{hub_key} and {path_key}: given {hub!r} and {path!r}, expected only one of the two. "
            f"To read the file add {hub_key}=null {section}.hf_dataset_config_name=null; "
            f"to read the hub's dataset add {path_key}=null."
        )
    if hub_config is not None and hub is None:
        key = f"{section}.hf_dataset_config_name"
        refuse(key, hub_config, f"null, since {hub_key} is null", f"Set {key}=null.")
