"""The certificate of an export: certificate.json beside the weights.

It names every file with its size and sha256, the origin of the weights, and the checks that were
made before the export became visible: the weights' bytes, their changes against the base, their
logits in transformers, chat template and stop tokens. Each check passed, failed, or was not made
for a stated reason. `recheck` repeats them later, without the run.

A check that fails or raises is a failed check and never deletes the export: the weights of a long
run are kept until someone has found the cause. The caller refuses the certificate (`require`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchprime.checkpoint.field_kinds import (
    OBJECT,
    TEXT,
    Kind,
    Table,
    check_fields,
    count,
    list_of,
    or_null,
    texts_to,
)
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.portable import check_tokenizer
from torchprime.checkpoint.hf.read import SafetensorsReader, check_names
from torchprime.checkpoint.hf.served_template import TrainedTemplate, check_served_template
from torchprime.checkpoint.hf.weight_names import HEAD
from torchprime.checkpoint.hf.whole import WholeModel
from torchprime.checkpoint.proof.base_changes import changes_from, told_changes
from torchprime.checkpoint.proof.entries import CertificateFile, LogitsValues
from torchprime.checkpoint.proof.logits import LOGIT_TOLERANCE, PROMPTS, PromptLogits, likeliest
from torchprime.checkpoint.proof.parts import OTHER_PARTS, check_other_parts, weights_values
from torchprime.checkpoint.proof.verify import LogitsMatch, NotChecked, compare_logits, read_back
from torchprime.errors import CheckpointError
from torchprime.files.atomic import write_json
from torchprime.files.hashing import FileFacts, hash_files
from torchprime.files.json_files import read_json, token_ids
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM

CERTIFICATE = "certificate.json"
FORMAT_VERSION = 1
FIELDS: Table = {
    "origin": TEXT,
    "base_model": or_null(TEXT),
    "step": or_null(count()),
    "dtype": TEXT,
    "fingerprints": OBJECT,
    "metrics": OBJECT,
    "versions": OBJECT,
    "checks": list_of(OBJECT, "a list of objects"),
    "files": texts_to(OBJECT),
}
CHECK: Table = {
    "name": TEXT,
    "passed": Kind("true, false or null", lambda v: v in (True, False, None)),
    "detail": TEXT,
    "values": OBJECT,
}
FIRST_CHANGE = 2  # with warm-up the first update has a learning rate of 0

Found = tuple[str, Mapping[str, object]]  # a check's words and its numbers


class UncertifiedError(CheckpointError):
    """Error for an export that is whole, with a certificate that has a failed check."""


@dataclass(frozen=True)
class Check:
    """A check: `passed` is None if it was not made; `values` are its numbers, by the check
    `WeightsValues`, `BaseChanges`, `LogitsValues` and others."""

    name: str
    passed: bool | None
    detail: str
    values: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Certificate:
    """The content of certificate.json.

    Attributes:
        origin: where the weights came from, for people.
        step: updates made; None if unknown.
        fingerprints: of data, config, tokenizer, ...
        metrics: the last values.
        files: size and sha256 of every other file of the folder.
    """

    origin: str
    base_model: str | None
    step: int | None
    dtype: str
    fingerprints: Mapping[str, object]
    metrics: Mapping[str, object]
    versions: dict[str, str]
    checks: tuple[Check, ...]
    files: dict[str, FileFacts]

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.passed is False]

    def check(self, name: str) -> Check:
        """Return the check of this name; raise a CheckpointError if the certificate does not have
        it."""
        for check in self.checks:
            if check.name == name:
                return check
        raise CheckpointError(f"{CERTIFICATE} has no check {name!r}; it was edited. Export again.")

    def tally(self) -> str:
        """Return the number of passed checks, and the names of those that did not pass."""
        return tally(self.checks)

    def require(self, where: object) -> None:
        """Raise an UncertifiedError if a check failed; `where` names the export's folder or URL."""
        if self.failed:
            told = "".join(f"\n  {check.name}: {check.detail}" for check in self.failed)
            raise UncertifiedError(
                f"The export in {where} is whole, but its certificate failed:{told}\nDo not use it "
                f"before you know why; to export again, remove it. {where}/{CERTIFICATE} has all "
                f"checks; `torchprime verify {where}` makes them again."
            )

    def to_dict(self) -> CertificateFile:
        """Return the content of certificate.json."""
        return {
            "format_version": FORMAT_VERSION,
            "passed": not self.failed,
            "origin": self.origin,
            "base_model": self.base_model,
            "step": self.step,
            "dtype": self.dtype,
            "fingerprints": dict(self.fingerprints),
            "metrics": {key: _plain(value) for key, value in self.metrics.items()},
            "versions": self.versions,
            "checks": [
                {
                    "name": check.name,
                    "passed": check.passed,
                    "detail": check.detail,
                    "values": check.values,
                }
                for check in self.checks
            ],
            "files": self.files,
        }


def tally(checks: tuple[Check, ...] | list[Check]) -> str:
    """Return the number of passed checks, the failed ones and those that were not made."""
    failed = [check.name for check in checks if check.passed is False]
    left_out = [check.name for check in checks if check.passed is None]
    parts = [f"{sum(check.passed is True for check in checks)} checks passed"]
    parts += [f"{len(failed)} failed ({', '.join(failed)})"] if failed else []
    parts += [f"{len(left_out)} not made ({', '.join(left_out)})"] if left_out else []
    return ", ".join(parts)


def _plain(value: Any) -> Any:
    """Replace NaN, which JSON does not have."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_certificate(folder: Path) -> Certificate:
    """Read the certificate in an export's folder.

    Raises:
        CheckpointError: there is none, or it is malformed or of another format.
    """
    path = folder / CERTIFICATE
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; give the folder of an export.")
    if not path.is_file():
        raise CheckpointError(
            f"There is no {CERTIFICATE} in {folder}, so there is nothing to verify it by. Give the "
            "folder of an export made by torchprime; a run's checkpoint has to be exported first "
            "(torchprime export CHECKPOINT --out DIR)."
        )
    content = read_json(path)
    version = content.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {version}; this torchprime reads format {FORMAT_VERSION}. Use the "
            "version that wrote it."
        )
    try:
        content.pop("passed")
        check_fields(content, FIELDS)
        for check in content["checks"]:
            check_fields(check, CHECK, "checks")
        content["checks"] = tuple(Check(**check) for check in content["checks"])
        files = content.pop("files")
        files = {n: FileFacts(bytes=f["bytes"], sha256=f["sha256"]) for n, f in files.items()}
        return Certificate(**content, files=files)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is not a certificate ({type(error).__name__}: {error}); it was cut short or "
            "edited. Export again."
        ) from error


def trained_options(folder: Path) -> dict[str, Any]:
    """Return the options that the chat template was given in training, from the certificate."""
    if not (folder / CERTIFICATE).is_file():
        return {}
    check = read_certificate(folder).check("chat template")
    return check.values.get("options", {})


# Making a certificate -----------------------------------------------------------------------------


def certify(
    folder: Path,
    hashes: Mapping[str, str],
    *,
    facts: ExportFacts,
    origin: str,
    trained: PromptLogits | str,
    base: Path | str | None,
    whole: WholeModel | None = None,
) -> Certificate:
    """Check a folder that is complete but for its certificate, and write the certificate.

    Args:
        hashes: of the weights as they were handed over; see `tensor_hash`.
        origin: where the weights come from, for people.
        trained: logits of the trainer's model, or the reason why there are none.
        base: the base's folder, or the reason why it can't be compared; None if training
            began from random weights.
        whole: the model around the text model, if the folder holds all of it.
    """
    others = [] if whole is None else [(OTHER_PARTS, lambda: check_other_parts(folder, whole.base))]
    proofs: list[tuple[str, Callable[[], Found]]] = [
        ("weights", lambda: _same_bytes(folder, hashes)),
        *others,
        ("tied weights", lambda: check_tied(folder)),
        ("base", lambda: check_base(folder, base, facts)),
        ("logits", lambda: _same_logits(folder, trained, facts.dtype)),
        ("chat template", lambda: check_template(folder, facts.trained_template())),
        ("stop tokens", lambda: check_stops(folder, facts.stop_ids)),
        ("tokenizer", lambda: check_ids(folder)),
    ]
    return write_certificate(folder, proofs, facts, origin, facts.base_model)


def write_certificate(
    folder: Path,
    proofs: Sequence[tuple[str, Callable[[], Found]]],
    facts: ExportFacts,
    origin: str,
    base_model: str | None,
) -> Certificate:
    """Make the checks and write the certificate of a folder that is complete but for it.

    Args:
        proofs: a check's name, and the check.
        base_model: name or folder of the base; None if training began from random weights.
    """
    certificate = Certificate(
        origin=origin,
        base_model=base_model,
        step=facts.step,
        dtype=facts.dtype_name,
        fingerprints=dict(facts.fingerprints),
        metrics=dict(facts.metrics),
        versions=dict(facts.card.versions),
        checks=tuple(judge(name, check, folder) for name, check in proofs),
        files=hash_folder(folder),
    )
    write_json(folder / CERTIFICATE, certificate.to_dict())
    return certificate


def judge(name: str, check: Callable[[], Found], folder: Path) -> Check:
    """Run a check. Any exception is a failure of the check, since libraries raise nearly
    anything."""
    try:
        detail, values = check()
        return Check(name, True, detail, values)
    except NotChecked as reason:
        return Check(name, None, str(reason))
    except CheckpointError as error:
        told = str(error)
    except Exception as error:
        told = f"{type(error).__name__}: {error}"
    # The folder may be renamed later, so its name is cut out of messages.
    return Check(name, False, told.replace(str(folder), "the export"))


def hash_folder(folder: Path) -> dict[str, FileFacts]:
    """Return size and sha256 of every file in the folder but the certificate, by relative name."""
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    paths.pop(CERTIFICATE, None)
    return hash_files(paths)


# The checks ---------------------------------------------------------------------------------------


def _same_bytes(folder: Path, hashes: Mapping[str, str]) -> Found:
    read_back(folder, hashes)
    values = weights_values(SafetensorsReader(folder), hashes)
    return f"{len(hashes)} tensors read back equal the trained weights", values


def check_tied(folder: Path) -> Found:
    """Check that the files hold exactly the tensors of config.json's model, with or without an
    output head."""
    config = read_json(folder / "config.json")
    architecture = architecture_from_hf(config)
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in CausalLM(architecture).named_parameters()}
    reader = SafetensorsReader(folder)
    tied = architecture.tie_word_embeddings
    check_names(shapes, reader, tied=tied)
    if tied and HEAD in reader.names():
        raise CheckpointError(f"config.json ties the embeddings, but the files hold {HEAD}.")
    how = f"tied, no {HEAD}" if tied else f"not tied, {HEAD} of its own"
    return f"{len(shapes)} tensors, those of config.json's model: {how}", {"tied": tied}


def check_base(folder: Path, base: Path | str | None, facts: ExportFacts) -> Found:
    """Check that training changed the weights, and report by how much."""
    if base is None:
        raise NotChecked("training began from random weights; there is no base")
    if isinstance(base, str):
        raise NotChecked(base)
    values = changes_from(SafetensorsReader(base), SafetensorsReader(folder), facts.unused_rows)
    if not values["changed"]:
        same = f"none of {values['tensors']} tensors differs from the base"
        if facts.step is None or facts.step < FIRST_CHANGE:
            raise NotChecked(f"{same}, as may be so early: updates made: {facts.step}")
        raise CheckpointError(
            f"{same} after {facts.step} updates: these are the base's weights, not trained ones"
        )
    return told_changes(values), values


def _same_logits(folder: Path, trained: PromptLogits | str, dtype: torch.dtype) -> Found:
    if isinstance(trained, str):
        raise NotChecked(f"logits not compared ({trained})")
    least = LOGIT_TOLERANCE[dtype]
    match = compare_logits(folder, trained.ids, trained.logits, least=least)
    rows, length = trained.ids.shape
    return (
        f"logits of transformers match the trainer's to {match.difference:.0e} of the largest "
        f"({rows} prompts of {length} tokens, {match.allowed()})"
    ), logits_values(trained, match)


def logits_values(trained: PromptLogits, match: LogitsMatch) -> LogitsValues:
    """Return the numbers of the check "logits"."""
    length = trained.ids.shape[1]
    return {
        "computed_by": trained.computed_by,
        "prompts": [
            {"text": text, "tokens": length, "likeliest_next": likeliest(logits[-1])}
            for text, logits in zip(PROMPTS, trained.logits, strict=True)
        ],
        "tolerance": match.tolerance,
        "rounding_floor": match.floor,
        "max_difference": match.difference,
    }


def check_template(folder: Path, trained: TrainedTemplate | None) -> Found:
    """Check that a server renders conversations, with and without tools, as in training."""
    if trained is None:
        raise NotChecked("no conversations were trained on")
    return check_served_template(folder, trained)


def check_stops(folder: Path, stop_ids: tuple[int, ...]) -> Found:
    """Check that a server stops at the tokens that the model was trained to stop at."""
    file = "generation_config.json"
    stops = token_ids(read_json(folder / file), "eos_token_id", file)
    missing = [i for i in stop_ids if i not in stops]
    if missing:
        raise CheckpointError(
            f"generation_config.json stops at {stops}, not at {missing}, which was trained to end "
            "an answer: a server would generate past it"
        )
    return f"generation_config.json stops at {stops}", {"stop_ids": list(stop_ids)}


def check_ids(folder: Path) -> Found:
    """Check that transformers (and so vLLM) reads the tokenizer as tokenizer.json defines it."""
    check_tokenizer(folder)
    return "AutoTokenizer gives the ids of tokenizer.json", {}
