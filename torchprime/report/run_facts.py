"""Facts of a run that its report shows, from run.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FINGERPRINTS = ("data", "eval", "tokenizer", "template", "data_version")


def _adapted(plan: Mapping[str, Any]) -> int | None:
    """Return the count of trained parameters; None if it is that of all, and in older runs."""
    trained = plan.get("trained_parameters")
    return None if trained in (None, plan["parameters"]) else trained


def describe_compiled(compiled: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the programs of each kind of step in words.

    Args:
        compiled: `programs` and `seconds` by kind of step, as in run.json.
    """
    total = sum(each["seconds"] for each in compiled.values())
    kinds = [
        f"{kind} {each['programs']} program{'s' * (each['programs'] != 1)} {each['seconds']:.1f} s"
        for kind, each in compiled.items()
    ]
    return f"in {total:.1f} s, first runs included: {', '.join(kinds)}"


@dataclass(frozen=True)
class RunFacts:
    """The part of run.json that a report shows.

    Attributes:
        total_steps: the number of steps that the run plans.
        starts: the step before each start of the run.
        pretrained: the model's folder or name; None if training began from random weights.
        mesh: the size of each axis.
        trained: parameters that an adapter's run trained, of its own and of the model's.
        versions: of packages, by name.
        fingerprints: those of FINGERPRINTS that the run has.
        block_size: tokens of a block.
        supervised_per_update: supervised tokens of an update, the mean over an epoch.
        compiled: programs and seconds by kind of step; empty for older runs and without a compiler.
    """

    total_steps: int
    starts: tuple[int, ...]
    command: str
    pretrained: str | None
    parameters: int
    trained: int | None  # None: all of them
    dtype: str
    backend: str
    attention: str
    device_kind: str
    device_count: int
    mesh: dict[str, int]
    versions: dict[str, str]
    fingerprints: dict[str, str]
    block_size: int
    supervised_per_update: float
    compiled: dict[str, dict[str, Any]]

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> RunFacts:
        """Return the facts in run.json; raise a KeyError or TypeError if a part is missing."""
        plan, model, device = content["plan"], content["model"], content["device"]
        found = content["fingerprints"]
        return cls(
            total_steps=plan["total_steps"],
            starts=tuple(start["step"] for start in content["starts"]),
            command=content["command"],
            pretrained=model["pretrained"],
            parameters=model["parameters"],
            trained=_adapted(plan),
            dtype=model["dtype"],
            backend=content["backend"],
            attention=content["attention"],
            device_kind=device["kind"],
            device_count=device["count"],
            mesh=dict(content["mesh"]),
            versions=dict(content["versions"]),
            fingerprints={name: found[name] for name in FINGERPRINTS if found.get(name)},
            block_size=plan["budget"]["block_size"],
            supervised_per_update=plan["budget"]["supervised_tokens_per_update"]["mean"],
            compiled=dict(content.get("compiled", {})),
        )

    @property
    def used_mesh(self) -> str:
        """The axes with more than one device, and the number of devices."""
        axes = [f"{axis} {size}" for axis, size in self.mesh.items() if size > 1]
        shape = f": {' x '.join(axes)}" if axes else ""
        return f"{self.device_count} x {self.device_kind}{shape}"

    def rows(self) -> dict[str, str]:
        """Return the rows of the report's table: the model, data and devices of the run."""
        weights = f"{self.parameters:,} parameters in {self.dtype}"
        if self.trained is not None:
            weights += f"; an adapter trained {self.trained:,}"
        compiled = {"compiled": describe_compiled(self.compiled)} if self.compiled else {}
        return {
            "command": self.command,
            "model": f"{self.pretrained or 'from random weights'}: {weights}",
            "backend": f"{self.backend}, attention {self.attention}",
            "mesh": self.used_mesh,
            "versions": ", ".join(f"{name} {value}" for name, value in self.versions.items()),
            **compiled,
        }
