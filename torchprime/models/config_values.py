"""Values of a config.json, checked for type and size.

A config.json is untrusted input: text for a number, null, a list or an absurd size is refused by
the name of its key. null means that the key is absent, as in transformers 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torchprime.errors import CheckpointError


class ConfigValues:
    """Typed access to the keys of a parsed config.

    Attributes:
        where: what to call the config in messages.
        path: of the keys, for messages: `rope_scaling.` for an object inside.
        names: the names of keys in messages, if a family has others for them.
    """

    def __init__(
        self,
        content: Mapping[str, Any],
        where: str,
        path: str = "",
        names: Mapping[str, str] | None = None,
    ) -> None:
        self.content, self.where, self.path, self.names = content, where, path, names or {}

    def __contains__(self, key: str) -> bool:
        return self.content.get(key) is not None

    def get(self, key: str) -> Any:
        """Return the value unchanged; None if it is absent."""
        return self.content.get(key)

    def fault(self, key: str, expected: str) -> CheckpointError:
        """Return the error for a key with a wrong value."""
        given = "missing" if self.content.get(key) is None else f"{self.content[key]!r:.100}"
        name = self.names.get(key, key)
        return CheckpointError(f"{self.where}: {self.path}{name} is {given}, expected {expected}.")

    def integer(
        self, key: str, default: int | None = None, *, least: int = 1, most: int = 2**20
    ) -> int:
        """Return an integer in a range; raise an error if it is absent and has no default."""
        value = self.content.get(key)
        value = default if value is None else value
        if isinstance(value, int) and not isinstance(value, bool) and least <= value <= most:
            return value
        raise self.fault(key, f"a whole number from {least:,} to {most:,}")

    def number(
        self, key: str, default: float | None = None, *, above: float = 0.0, equal: bool = False
    ) -> float:
        """Return a finite number above a bound, or equal to it if that is allowed."""
        value = self.content.get(key)
        value = default if value is None else value
        if isinstance(value, int | float) and not isinstance(value, bool):
            # An integer may be too large for a float.
            found = float(value) if abs(value) < 1e300 else math.inf
            if math.isfinite(found) and (found > above or (equal and found == above)):
                return found
        raise self.fault(key, f"a number {'of at least' if equal else 'above'} {above:g}")

    def flag(self, key: str, default: bool = False) -> bool:
        """Return true or false."""
        value = self.content.get(key)
        value = default if value is None else value
        if isinstance(value, bool):
            return value
        raise self.fault(key, "true or false")

    def inner(self, key: str) -> ConfigValues | None:
        """Return the object under a key; None if it is absent or empty."""
        value = self.content.get(key)
        if value is None or isinstance(value, Mapping):
            path = f"{self.path}{self.names.get(key, key)}."
            return ConfigValues(value, self.where, path) if value else None
        raise self.fault(key, "an object or null")
