"""Repetition of a certificate's checks on a folder that may have been copied since.

Only checks that need no more than the folder (and the base's, if given) are repeated; the rest is
listed with the reason. A certificate is no signature: it detects damaged, confused or edited
files, but not files that were changed together with the certificate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.served_template import TrainedTemplate
from torchprime.checkpoint.hf.write import is_finite, tensor_hash
from torchprime.checkpoint.proof.base_changes import changes_from, told_changes
from torchprime.checkpoint.proof.certificate import (
    CERTIFICATE,
    Certificate,
    Check,
    Found,
    check_ids,
    check_stops,
    check_template,
    check_tied,
    hash_folder,
    judge,
    read_certificate,
)
from torchprime.checkpoint.proof.logits import encode_prompts, no_room
from torchprime.checkpoint.proof.parts import OTHER_PARTS, check_other_parts, weights_values
from torchprime.checkpoint.proof.verify import (
    NotChecked,
    judge_logits,
    load_transformers,
    logits_of,
)
from torchprime.errors import CheckpointError

# Files that some reader of a model would open though the certificate does not list them.
READ = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"),
    *(".py", ".json", ".jinja", ".model", ".txt"),
)


def recheck(folder: Path, base: Path | None = None) -> tuple[Certificate, list[Check]]:
    """Repeat the checks that can be repeated.

    Args:
        base: the folder of the base's weights.

    Raises:
        CheckpointError: no certificate, or one that cannot be read.
    """
    certificate = read_certificate(folder)
    again: list[tuple[str, Callable[[], Found]]] = [
        ("when written", lambda: check_when_written(certificate)),
        ("files", lambda: check_files(folder, certificate)),
        ("weights", lambda: check_weights(folder, recorded_values(certificate, "weights"))),
        *_checks_of_other_parts(folder, base, certificate),
        ("tied weights", lambda: check_tied(folder)),
        ("base", lambda: _base(folder, base, certificate)),
        ("logits", lambda: _logits(folder, recorded_values(certificate, "logits"), certificate)),
        *checks_beside_weights(folder, certificate),
    ]
    return certificate, [judge(name, check, folder) for name, check in again]


def _checks_of_other_parts(
    folder: Path, base: Path | None, certificate: Certificate
) -> list[tuple[str, Callable[[], Found]]]:
    """Return the check of a whole model's other parts; none for a text model."""
    if not any(check.name == OTHER_PARTS for check in certificate.checks):
        return []

    def check() -> Found:
        recorded = recorded_values(certificate, OTHER_PARTS)
        told, values = check_other_parts(folder, base)
        if values != recorded:
            raise CheckpointError(f"{told} are not those certified")
        return told if base is not None else f"{told} are those certified", values

    return [(OTHER_PARTS, check)]


def checks_beside_weights(
    folder: Path, certificate: Certificate
) -> list[tuple[str, Callable[[], Found]]]:
    """Return the last checks of every certificate by name: those that need no weights."""

    def recorded(name: str) -> Mapping[str, Any]:
        return recorded_values(certificate, name)

    return [
        (
            "chat template",
            lambda: check_template(folder, TrainedTemplate.from_values(recorded("chat template"))),
        ),
        ("stop tokens", lambda: check_stops(folder, tuple(recorded("stop tokens")["stop_ids"]))),
        ("tokenizer", lambda: check_ids(folder)),
        ("fingerprints", lambda: not_repeated(certificate.fingerprints, "rows and config")),
        ("metrics", lambda: not_repeated(certificate.metrics, "the run and its held-out rows")),
    ]


def recorded_values(certificate: Certificate, name: str) -> Mapping[str, Any]:
    """Return a recorded check's numbers; raise NotChecked if it was not made, or failed without
    numbers."""
    recorded = certificate.check(name)
    if recorded.passed is None:
        raise NotChecked(f"nor when the certificate was written: {recorded.detail}")
    if not recorded.passed:
        raise NotChecked("it failed when the certificate was written")
    return recorded.values


def check_when_written(certificate: Certificate) -> Found:
    """Check that no check had failed when the certificate was written."""
    if certificate.failed:
        told = "; ".join(f"{check.name}: {check.detail}" for check in certificate.failed)
        raise CheckpointError(f"it was written with failed checks: {told}")
    return certificate.tally(), {}


def check_files(folder: Path, certificate: Certificate) -> Found:
    """Check that the folder holds the certified files, and no other that a reader would open."""
    found, expected = hash_folder(folder), certificate.files
    wrong = [f"{name} is missing" for name in expected if name not in found]
    for name, facts in expected.items():
        if name in found and found[name] != facts:
            here = found[name]["bytes"]
            size = f"{here:,} bytes instead of {facts['bytes']:,}" if here != facts["bytes"] else ""
            wrong.append(f"{name} differs ({size or 'its sha256'})")
    more = [name for name in found if name not in expected and not _hidden(name)]
    wrong += [f"{name} is not certified" for name in more if Path(name).suffix in READ]
    if wrong:
        raise CheckpointError("; ".join(wrong))
    beside = [name for name in more if Path(name).suffix not in READ]
    note = f"; not certified, and no reader opens them: {', '.join(beside)}" if beside else ""
    size = sum(facts["bytes"] for facts in expected.values())
    return f"{len(expected)} files, {size / 1e6:,.1f} MB, as certified{note}", {}


def _hidden(name: str) -> bool:
    """Return True for files such as those in .git/ and .cache/, which downloads leave."""
    return any(part.startswith(".") for part in Path(name).parts)


def check_weights(folder: Path, recorded: Mapping[str, Any]) -> Found:
    """Check that the tensors are finite, and those of the certificate.

    Args:
        recorded: the numbers of the certificate's check.
    """
    reader = SafetensorsReader(folder)
    hashes = {}
    for name in reader.names():
        tensor = reader.get(name)
        if not is_finite(tensor):
            raise CheckpointError(f"{name} holds NaN or infinite values")
        hashes[name] = tensor_hash(tensor)
    values = weights_values(reader, hashes)
    other = [
        f"{key} {value}, certified {recorded[key]}"
        for key, value in values.items()
        if value != recorded[key]
    ]
    if other:
        raise CheckpointError(f"the tensors are not those certified: {'; '.join(other)}")
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in values["dtypes"].items())
    return f"{values['tensors']} tensors ({kinds}) are those that left the trainer", values


def _base(folder: Path, base: Path | None, certificate: Certificate) -> Found:
    if base is None:
        named = certificate.base_model
        raise NotChecked(
            "there is none: training began from random weights"
            if named is None
            else f"give its folder to compare with it again: --base FOLDER (it is {named})"
        )
    recorded = certificate.check("base").values
    unused = recorded.get("unused_rows", [])
    values = changes_from(SafetensorsReader(base), SafetensorsReader(folder), unused)
    if recorded and values != recorded:
        raise CheckpointError(
            f"{told_changes(values)}; certified was: {told_changes(recorded)}. Is that folder the "
            f"base of this export ({certificate.base_model})?"
        )
    if not values["changed"]:
        raise CheckpointError(f"none of {values['tensors']} tensors differs from the base")
    return told_changes(values), values


def recorded_prompts(folder: Path, recorded: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    """Return the ids [B, S] of the certified prompts."""
    prompts = recorded["prompts"]
    texts = [prompt["text"] for prompt in prompts]
    return encode_prompts(folder / "tokenizer.json", texts, longest=prompts[0]["tokens"])


def distance_from(recorded: Mapping[str, Any], logits: npt.NDArray[np.float32]) -> float:
    """Return the largest difference of logits [B, S, V] from the certified ones, relative to the
    largest logit."""
    largest = float(np.abs(logits).max())
    return max(
        abs(float(row[-1][int(token)]) - value) / largest
        for row, prompt in zip(logits, recorded["prompts"], strict=True)
        for token, value in prompt["likeliest_next"].items()
    )


def _logits(folder: Path, recorded: Mapping[str, Any], certificate: Certificate) -> Found:
    parameters = certificate.check("weights").values["parameters"]
    if reason := no_room(parameters, getattr(torch, certificate.dtype)):
        raise NotChecked(reason)
    ids = recorded_prompts(folder, recorded)
    model = load_transformers(folder)
    logits = logits_of(model, ids)
    worst = distance_from(recorded, logits)
    match = judge_logits(model, ids, logits, worst, recorded["tolerance"])
    if not match.within:
        raise CheckpointError(
            f"logits in transformers differ from the certified ones by {worst:.1e} of the largest, "
            f"{match.allowed()}"
        )
    return (
        f"after {len(ids)} prompts transformers' logits are the certified ones to {worst:.0e} "
        f"of the largest (computed by {recorded['computed_by']})"
    ), {}


def not_repeated(recorded: Mapping[str, object], what: str) -> Found:
    """Raise NotChecked with the recorded values; `what` names the inputs that a check needs."""
    told = ", ".join(
        f"{key} {_short(value)}" for key, value in recorded.items() if value is not None
    )
    raise NotChecked(f"{what} are not in the folder; {CERTIFICATE} says: {told or 'nothing'}")


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)[:12]
