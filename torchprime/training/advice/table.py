"""The table of devices and recommended values, assets/advice/table.yaml."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import yaml

from torchprime.config.checks import refuse
from torchprime.config.compose import assets_dir
from torchprime.config.load import nearest
from torchprime.config.topologies import GIB, TOPOLOGIES, canonical, topology

Kind = Literal["gpu", "tpu"]


@dataclass(frozen=True)
class Devices:
    """Devices of one kind that a run would have.

    Attributes:
        name: as given, in lower case.
        memory: bytes of one device.
        fill: the part of it that a plan may fill.
    """

    name: str
    kind: Kind
    count: int
    memory: int
    fill: float

    @property
    def room(self) -> int:
        """Bytes on one device that a plan may fill."""
        return int(self.memory * self.fill)


@dataclass(frozen=True)
class Advice:
    """A recommended value, why, and where it is from."""

    value: float
    reason: str
    source: str


@cache
def table() -> Mapping[str, Any]:
    """Return the table's content."""
    content: Mapping[str, Any] = yaml.safe_load(
        (assets_dir() / "advice" / "table.yaml").read_text(encoding="utf-8")
    )
    return content


def first_fit(entries: Sequence[Mapping[str, Any]], limit: str, size: float) -> Advice:
    """Return the first entry whose limit is not below a size.

    Args:
        limit: the key of the limits.
    """
    entry = next(entry for entry in entries if size <= entry[limit])
    return advice_in(entry)


def advice_in(entry: Mapping[str, Any]) -> Advice:
    """Return the advice that an entry of the table holds."""
    return Advice(float(entry["value"]), entry["reason"], entry["source"])


def devices_named(given: str) -> Devices:
    """Return the devices of a name: a TPU slice (`v6e-8`), or a GPU with a number (`h100-80gb:8`).

    Raises:
        ConfigError: an unknown name, with the nearest known ones, or a number that is none.
    """
    name, colon, number = given.strip().lower().partition(":")
    gpus = table()["gpus"]
    if name in gpus:
        if colon and not (number.isascii() and number.isdigit() and 1 <= int(number) <= 4096):
            refuse("--device", given, f"{name}, or {name}:8 for eight of them", "Give a number.")
        count = int(number) if colon else 1
        return Devices(name, "gpu", count, int(gpus[name] * GIB), table()["fill"]["gpu"])
    if canonical(name) not in TOPOLOGIES or colon:
        close = nearest(name, [*gpus, *TOPOLOGIES])
        refuse(
            "--device",
            given,
            f"a GPU ({', '.join(gpus)}; name:8 for eight) or a TPU slice ({', '.join(TOPOLOGIES)})",
            f"Did you mean {close}?" if close else "Set --device v6e-8, for example.",
        )
    found = topology(name, "--device")
    fill = table()["fill"]["tpu"]
    return Devices(found.name, "tpu", found.chips, found.chip.hbm_bytes, fill)
