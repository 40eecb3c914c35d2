"""The certificate of an adapter's folder: certificate.json beside its tensors.

It has the form of any export's certificate (proof/certificate.py). Its checks are about what an
adapter is for: PEFT loads it over the base and computes the trainer's logits, the base is what it
was, the adapter changes something, and a merge costs no more than rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchprime.adapters.lora import B
from torchprime.adapters.peft_format import PREFIX
from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.folder import AdapterFolder
from torchprime.checkpoint.adapter.logits import adapted_logits
from torchprime.checkpoint.adapter.merge import merged_tensors
from torchprime.checkpoint.adapter.parts import AdapterParts
from torchprime.checkpoint.adapter.read import StoredAdapter, read_adapter
from torchprime.checkpoint.adapter.with_peft import PeftOverBase
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.write import weight_hashes
from torchprime.checkpoint.proof.certificate import (
    FIRST_CHANGE,
    Certificate,
    Found,
    check_ids,
    check_stops,
    check_template,
    logits_values,
    write_certificate,
)
from torchprime.checkpoint.proof.logits import (
    LOGIT_TOLERANCE,
    Logits,
    PromptLogits,
    decoder_logits,
    no_room,
    prompt_ids,
)
from torchprime.checkpoint.proof.parts import weights_values
from torchprime.checkpoint.proof.verify import NotChecked, read_back
from torchprime.errors import CheckpointError
from torchprime.files.json_files import read_json
from torchprime.models.architecture import architecture_from_hf


def certify_adapter(
    folder: Path,
    hashes: Mapping[str, str],
    *,
    adapter: AdapterFolder,
    facts: ExportFacts,
    origin: str,
    trained: PromptLogits | str,
    base: Path | str | None,
) -> Certificate:
    """Check an adapter's folder that is complete but for its certificate, and write that.

    A check that fails or raises is a failed check of the certificate, and no error: the caller
    refuses it (`Certificate.require`).

    Args:
        hashes: of the tensors as they were handed over, by PEFT's names; see `tensor_hash`.
        facts: of the run; `facts.dtype` is the one that it computed in.
        origin: where the tensors come from, for people.
        trained: logits of the trainer's model, or the reason why there are none. For a quantized
            base they are those over the dequantized values.
        base: the base's folder, or the reason why it can't be read; None if it had random weights.
    """
    over = OverBase(folder, base, facts.dtype, adapter.spec.base_type, adapter.base_sha256)
    named = {name.removeprefix(PREFIX): value for name, value in hashes.items()}
    proofs: list[tuple[str, Callable[[], Found]]] = [
        ("weights", lambda: _same_bytes(folder, named)),
        ("adapter", partial(_fits, over, adapter)),
        ("trained", lambda: check_trained(over.stored, facts.step)),
        ("base", over.check_base),
        ("logits", lambda: over.check_logits(trained)),
        ("merged", over.check_merged),
        ("chat template", lambda: check_template(folder, facts.trained_template())),
        ("stop tokens", lambda: check_stops(folder, facts.stop_ids)),
        ("tokenizer", lambda: check_ids(folder)),
    ]
    return write_certificate(folder, proofs, facts, origin, adapter.base)


def base_fingerprint(base: Path) -> dict[str, Any]:
    """Return the number of a base's tensors and values, its types, and `sha256`, one hash of all
    its weights; it reads all of them once."""
    reader = SafetensorsReader(base)
    return dict(weights_values(reader, weight_hashes(reader)))


@dataclass(frozen=True)
class OverBase:
    """An adapter's folder together with the folder of its base.

    Attributes:
        base: None or a reason as in `certify_adapter`.
        dtype: of the run.
        base_type: the storage of the base's weights in the run.
        base_sha256: expected of the base's weights; None if it is not known.
    """

    folder: Path
    base: Path | str | None
    dtype: torch.dtype
    base_type: str
    base_sha256: str | None = None

    @cached_property
    def stored(self) -> StoredAdapter:
        """The folder's content."""
        return read_adapter(self.folder)

    @property
    def spec(self) -> AdapterSpec:
        """The adapter's description with the run's storage of the base."""
        return replace(self.stored.spec, base_type=self.base_type)  # type: ignore[arg-type]

    @property
    def base_folder(self) -> Path:
        """The base's folder; NotChecked is raised if there is none."""
        if self.base is None:
            raise NotChecked("the base had random weights; there are no files of it")
        if isinstance(self.base, str):
            raise NotChecked(self.base)
        return self.base

    @cached_property
    def reader(self) -> SafetensorsReader:
        """The base's tensors, by the names of the model."""
        reader = SafetensorsReader(self.base_folder)
        reader.share_head()
        return reader

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's config.json, with the vocabulary of the adapted model."""
        return self.stored.config_for(read_json(self.base_folder / "config.json"))

    @cached_property
    def parts(self) -> AdapterParts:
        """The adapter's parts in the base's model, checked."""
        return self.stored.fit(self.config)

    @cached_property
    def in_peft(self) -> PeftOverBase:
        """PEFT's model; NotChecked is raised if host memory can't hold it."""
        self.require_room()
        return PeftOverBase(self.folder, self.base_folder, self.spec, self.parts, self.dtype)

    def require_room(self) -> None:
        """Raise NotChecked if host memory can't hold the base twice."""
        shapes = (shape for shape, _ in self.reader.names().values())
        if reason := no_room(sum(math.prod(shape) for shape in shapes), self.dtype):
            raise NotChecked(reason)

    def check_base(self) -> Found:
        """Check that the base's weights are those that the run began with, in the files and, after
        the adapter was loaded over them, in PEFT."""
        values = base_fingerprint(self.base_folder)
        sha = values["sha256"]
        if self.base_sha256 is not None and sha != self.base_sha256:
            raise CheckpointError(
                f"the base's weights have sha256 {sha}, not {self.base_sha256}, which they had "
                "when the adapter was trained: another base, or its files were changed"
            )
        told = [f"{values['tensors']} tensors with sha256 {sha[:12]}"]
        if self.base_sha256 is not None:
            told.append("as in training")
        try:
            changed = self.in_peft.changed_base()
        except NotChecked as reason:
            told.append(f"not compared in PEFT: {reason}")
        else:
            if changed:
                raise CheckpointError(f"PEFT's base differs from the files: {changed[0]}")
            told.append("unchanged in PEFT's model")
        return ", ".join(told), values

    def check_logits(self, trained: PromptLogits | str) -> Found:
        """Check that PEFT over the base computes the trainer's logits."""
        if isinstance(trained, str):
            raise NotChecked(f"logits not compared ({trained})")
        found = self.in_peft.logits(trained.ids, as_trained=True)
        if found.shape != trained.logits.shape:
            raise CheckpointError(
                f"The trainer's logits have shape {trained.logits.shape}, PEFT's {found.shape}."
            )
        difference = gap(found, trained.logits)
        match = self.in_peft.judge(trained.ids, difference, LOGIT_TOLERANCE[self.dtype])
        if not match.within:
            raise CheckpointError(
                f"PEFT over the base computes something else than the trained model: logits differ "
                f"by {difference:.2e} of the largest, {match.allowed()}"
            )
        values: dict[str, Any] = dict(logits_values(trained, match))
        rows, length = trained.ids.shape
        told = (
            f"logits of PEFT over the base match the trainer's to {difference:.0e} of the largest "
            f"({rows} prompts of {length} tokens, {match.allowed()})"
        )
        if self.base_type != "run":
            original = self.in_peft.logits(trained.ids, as_trained=False)
            values["over_original_base"] = gap(original, trained.logits)
            told += (
                f"; the base had its {self.base_type} values, and over its original ones they "
                f"differ by {values['over_original_base']:.0e}"
            )
        return told, values

    def check_merged(self) -> Found:
        """Measure how far the merged model's logits are from those of base and adapter together.

        Both are computed by our own decoder on the CPU, in the run's type.

        Raises:
            CheckpointError: they differ by more than rounding (in fp32).
        """
        self.require_room()
        gaps = {into: self._merge_gap(into) for into in self._bases()}
        allowed = LOGIT_TOLERANCE[torch.float32]
        first = next(iter(gaps.values()))  # into the values that the adapter was trained on
        if not all(map(math.isfinite, gaps.values())) or (
            self.dtype == torch.float32 and first > allowed
        ):
            raise CheckpointError(
                f"the merged model's logits differ by {gaps} of the largest from those of base and "
                f"adapter; allowed is {allowed:.0e} in float32"
            )
        told = " and ".join(f"{value:.0e} (into the {into})" for into, value in gaps.items())
        name = str(self.dtype).removeprefix("torch.")
        values = {"dtype": name, "gaps": gaps}
        return f"merged in {name}, logits differ by {told} of the largest", values

    def _bases(self) -> list[str]:
        return ["base"] if self.base_type == "run" else ["dequantized base", "original base"]

    def _merge_gap(self, into: str) -> float:
        original = into == "original base"
        spec = replace(self.spec, base_type="run") if original else self.spec
        tensor_of = merged_tensors(self.reader.get, self.stored.tensors, spec, self.dtype)
        return gap(decoder_logits(self.config, tensor_of, self.dtype, self._ids), self._unmerged)

    @cached_property
    def _ids(self) -> np.ndarray:
        return prompt_ids(self.folder, architecture_from_hf(self.config))

    @cached_property
    def _unmerged(self) -> Logits:
        trained = self.stored.tensors
        assert self.parts.shapes  # checked before
        return adapted_logits(
            self.config, self.reader.get, trained, self.spec, self.dtype, self._ids
        )


def gap(one: Logits, other: Logits) -> float:
    """Return the largest difference of two programs' logits, relative to the largest logit."""
    return float(np.abs(one - other).max() / np.abs(other).max())


def _same_bytes(folder: Path, hashes: Mapping[str, str]) -> Found:
    read_back(folder, hashes)
    values = weights_values(SafetensorsReader(folder), hashes)
    return f"{len(hashes)} tensors read back equal the trained ones", values


def _fits(over: OverBase, adapter: AdapterFolder) -> Found:
    """Check that the folder read back describes the adapter that was trained."""
    parts = over.stored.fit(adapter.hf.config)
    if (parts.targets, parts.whole) != (adapter.parts.targets, adapter.parts.whole):
        raise CheckpointError("adapter_config.json names other layers than those that were trained")
    return told_adapter(over.spec, parts), {"spec": asdict(over.spec)}


def told_adapter(spec: AdapterSpec, parts: AdapterParts) -> str:
    """Return an adapter's size in words."""
    kind = "DoRA" if spec.dora else "LoRA"
    whole = f", and {', '.join(parts.whole)} whole" if parts.whole else ""
    return f"{kind} of rank {spec.rank} on {len(parts.targets)} layers{whole}"


def check_trained(stored: StoredAdapter, step: int | None) -> Found:
    """Check that B is not 0 everywhere, which would leave the base as it is.

    Args:
        step: updates made; B begins at 0, and is so after the first update with warm-up.
    """
    b = [name for name in stored.tensors if name.endswith(B)]
    zero = [name for name in b if not stored.tensors[name].any()]
    if len(zero) == len(b):
        if step is None or step < FIRST_CHANGE:
            raise NotChecked(f"B is 0 in all layers, as may be so early: updates made: {step}")
        raise CheckpointError(f"B is 0 in all {len(b)} layers after {step} updates")
    values = {"adapted_layers": len(b), "zero": len(zero)}
    if zero:
        return f"B is 0 in {len(zero)} of {len(b)} layers, the first is {zero[0]}", values
    return f"B of all {len(b)} layers is not 0", values
