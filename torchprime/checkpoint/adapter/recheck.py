"""Repetition of the checks of an adapter's certificate, on a folder that may have been copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from torchprime.adapters.peft_format import CONFIG_NAME
from torchprime.checkpoint.adapter.certificate import OverBase, check_trained, told_adapter
from torchprime.checkpoint.proof.certificate import (
    Certificate,
    Check,
    Found,
    judge,
    read_certificate,
)
from torchprime.checkpoint.proof.recheck import (
    check_files,
    check_weights,
    check_when_written,
    checks_beside_weights,
    distance_from,
    recheck,
    recorded_prompts,
    recorded_values,
)
from torchprime.errors import CheckpointError


def recheck_any(folder: Path, base: Path | None = None) -> tuple[Certificate, list[Check]]:
    """Repeat the checks of an export's or an adapter's certificate that can be repeated.

    Args:
        base: the folder of the base's weights.

    Raises:
        CheckpointError: no certificate, or one that cannot be read.
    """
    if (folder / CONFIG_NAME).is_file():
        return recheck_adapter(folder, base)
    return recheck(folder, base)


def recheck_adapter(folder: Path, base: Path | None = None) -> tuple[Certificate, list[Check]]:
    """Repeat the checks of an adapter's certificate; those of PEFT need its base.

    Raises:
        CheckpointError: no certificate, or one that cannot be read.
    """
    certificate = read_certificate(folder)

    def recorded(name: str) -> Mapping[str, Any]:
        return recorded_values(certificate, name)

    over = _over(folder, base, certificate)
    again: list[tuple[str, Callable[[], Found]]] = [
        ("when written", lambda: check_when_written(certificate)),
        ("files", lambda: check_files(folder, certificate)),
        ("weights", lambda: check_weights(folder, recorded("weights"))),
        ("adapter", lambda: (told_adapter(over.spec, over.parts), {})),
        ("trained", lambda: check_trained(over.stored, certificate.step)),
        ("base", over.check_base),
        ("logits", lambda: _logits(over, recorded("logits"))),
        ("merged", over.check_merged),
        *checks_beside_weights(folder, certificate),
    ]
    return certificate, [judge(name, check, folder) for name, check in again]


def trained_base_type(certificate: Certificate) -> str:
    """Return the storage that the base had in training: `run`, `int8` or `nf4`."""
    spec = certificate.check("adapter").values.get("spec", {})
    return spec.get("base_type", "run") if isinstance(spec, dict) else "run"


def _over(folder: Path, base: Path | None, certificate: Certificate) -> OverBase:
    named = certificate.base_model
    missing = f"give the base's folder to check with it again: --base FOLDER (it is {named})"
    return OverBase(
        folder,
        missing if base is None else base,
        getattr(torch, certificate.dtype),
        trained_base_type(certificate),
        certificate.check("base").values.get("sha256"),
    )


def _logits(over: OverBase, recorded: Mapping[str, Any]) -> Found:
    ids = recorded_prompts(over.folder, recorded)
    worst = distance_from(recorded, over.in_peft.logits(ids, as_trained=True))
    match = over.in_peft.judge(ids, worst, recorded["tolerance"])
    if not match.within:
        raise CheckpointError(
            f"logits of PEFT over the base differ from the certified ones by {worst:.1e} of the "
            f"largest, {match.allowed()}"
        )
    return (
        f"after {len(ids)} prompts the logits of PEFT over the base are the certified ones to "
        f"{worst:.0e} of the largest (computed by {recorded['computed_by']})"
    ), {}
