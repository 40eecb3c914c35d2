"""The merge of a PEFT folder into its base, long after the run: a Hugging Face folder.

Weights are read, merged, written and hashed one at a time, so host memory holds one tensor. The
certificate is that of any export. Its logits are those of base and adapter together, not merged,
by our own decoder; so the check "logits" measures what the merge costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchprime.adapters.spec import BaseType
from torchprime.checkpoint.adapter.logits import adapted_logits
from torchprime.checkpoint.adapter.merge import merged_tensors, require_blocks
from torchprime.checkpoint.adapter.parts import plain_decoder
from torchprime.checkpoint.adapter.read import StoredAdapter
from torchprime.checkpoint.adapter.recheck import trained_base_type
from torchprime.checkpoint.export import ExportResult, export_hf
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.read import SafetensorsReader, check_names
from torchprime.checkpoint.hf.served_template import TrainedTemplate
from torchprime.checkpoint.hf.source import hub_name
from torchprime.checkpoint.hf.weight_names import EMBEDDING
from torchprime.checkpoint.hf.whole import Parts, WholeFolder, WholeModel
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.proof.certificate import (
    CERTIFICATE,
    Certificate,
    certify,
    read_certificate,
)
from torchprime.checkpoint.proof.logits import (
    LOGIT_TOLERANCE,
    PromptLogits,
    no_room,
    prompt_ids,
)
from torchprime.errors import CheckpointError
from torchprime.files.json_files import read_json, read_json_if_there, token_ids
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.families import is_wrapper
from torchprime.models.unsupported import DEQUANTIZE

MAX_SHARD_BYTES = 5_000_000_000
GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Merge:
    """An adapter, the base that it is merged into, and how.

    Attributes:
        adapter: read from its folder.
        base: the folder of the base's weights.
        base_name: as the user gave it, for card and certificate.
        dtype: of the merged weights; None for that of the run or, if unknown, of the base.
        base_type: the values of the base that the adapter is merged into: `run` the original ones,
            `int8` or `nf4` the dequantized ones; None for those that it was trained on, as the
            folder's certificate has it, else the original ones.
        parts: of a wrapper that are exported.
    """

    adapter: StoredAdapter
    base: Path
    base_name: str
    dtype: torch.dtype | None = None
    base_type: BaseType | None = None
    parts: Parts = "text"

    def check(self) -> None:
        """Check that the adapter fits the base.

        Raises:
            CheckpointError: a quantized base, an incomplete one, one of other shapes or that can't
                have been in `into`, or weights of a type that is not exported.
        """
        if self.config.get("quantization_config"):
            raise CheckpointError(
                f"{self.base_name} holds quantized weights (quantization_config in config.json), "
                "which an adapter cannot be merged into: the sum would have to be quantized again. "
                f"For a merge into the original weights, {DEQUANTIZE}."
            )
        self.adapter.fit(self.config)
        check_names(self._base_shapes, self.reader, tied=self.tied)
        require_blocks(self.shapes, self.into)
        if self.out_dtype not in LOGIT_TOLERANCE:
            raise CheckpointError(
                f"{self.base_name} holds weights of type {self.out_dtype}; give the type of the "
                "merged ones: --dtype bf16 or fp32."
            )

    @cached_property
    def config(self) -> dict[str, Any]:
        """The base's config.json, with the vocabulary of the adapted model."""
        config = read_json(self.base / "config.json")
        return config if config.get("quantization_config") else self.adapter.config_for(config)

    @cached_property
    def wrapper(self) -> str | None:
        """The base's model_type, if the adapter is of the text model inside; else None."""
        config = read_json(self.base / "config.json")
        return str(config["model_type"]) if is_wrapper(config) else None

    @cached_property
    def whole(self) -> WholeModel | None:
        """The model around the text model, if all parts are exported."""
        return None if self.parts == "text" else WholeModel(self.base)

    @cached_property
    def reader(self) -> SafetensorsReader:
        """The base's tensors."""
        return SafetensorsReader(self.base)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The merged model's weights."""
        return {n: tuple(p.shape) for n, p in plain_decoder(self.config).named_parameters()}

    @property
    def _base_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes expected in the base's files; a trained embedding may have more rows."""
        found = self.reader.names()
        return {
            name: found[name][0] if name in self.adapter.tensors and name in found else shape
            for name, shape in self.shapes.items()
        }

    @property
    def tied(self) -> bool:
        """True if the output projection is the embedding."""
        return plain_decoder(self.config).lm_head is None

    @cached_property
    def certificate(self) -> Certificate | None:
        """The adapter's certificate; None for a folder that another program wrote."""
        folder = self.adapter.folder
        return read_certificate(folder) if (folder / CERTIFICATE).is_file() else None

    @property
    def run_dtype(self) -> torch.dtype:
        """The type that the adapter was trained in, or the base's if that is unknown."""
        if self.certificate is not None:
            return getattr(torch, self.certificate.dtype)
        return self.reader.names()[EMBEDDING][1]

    @property
    def out_dtype(self) -> torch.dtype:
        """The type of the merged weights."""
        return self.dtype or self.run_dtype

    @property
    def into(self) -> BaseType:
        """The values of the base that the adapter is merged into."""
        if self.base_type is not None:
            return self.base_type
        if self.certificate is None:
            return "run"
        return trained_base_type(self.certificate)  # type: ignore[return-value]

    def tensor_of(self, name: str) -> Tensor:
        """Return a merged tensor."""
        spec = replace(self.adapter.spec, base_type=self.into)
        merged = merged_tensors(
            self.reader.get, self.adapter.tensors, spec, self.out_dtype, run_dtype=self.run_dtype
        )
        return merged(name)

    def unmerged(self, folder: Path) -> PromptLogits | str:
        """Return the logits of base and adapter together, or the reason why there are none.

        Args:
            folder: holds the tokenizer.
        """
        count = sum(torch.Size(shape).numel() for shape in self.shapes.values())
        if reason := no_room(count, self.out_dtype):
            return reason
        ids = prompt_ids(folder, architecture_from_hf(self.config))
        spec = replace(self.adapter.spec, base_type=self.into)
        logits = adapted_logits(
            self.config,
            self.reader.get,
            self.adapter.tensors,
            spec,
            self.out_dtype,
            ids,
            self.run_dtype,
        )
        return PromptLogits(ids, logits, "torchprime's decoder on the CPU, not merged")


def export_merged(
    merge: Merge, out: Path | str | ExportPlace, say: Callable[[str], None]
) -> ExportResult:
    """Write the merged model at `out`, whole or not at all, and prove it.

    Args:
        out: a folder or URL.

    Raises:
        CheckpointError: used target, an adapter or base that cannot be merged, a failed check; in
            the latter case the folder is there, with the failed certificate.
    """
    place = ExportPlace.of(out)
    place.require_new()
    merge.check()
    if note := merge.adapter.base_note(merge.base_name):
        say(f"note: {note}")
    folder, facts = _folder_and_facts(merge)
    exported = folder if merge.whole is None else WholeFolder(folder, merge.whole)
    for line in exported.check():
        say(f"note: {line}")
    result = export_hf(
        place,
        folder,
        card=facts.card_text(),
        weights=((name, merge.tensor_of(name)) for name in facts.spec),
        certify=partial(_certify, merge, facts),
        whole=merge.whole,
    )
    assert result.certificate is not None
    result.certificate.require(place)
    proofs = "; ".join(result.certificate.check(part).detail for part in ("weights", "logits"))
    kind = "" if merge.into == "run" else f"the {merge.into} values of "
    say(
        f"merged {merge.adapter.where} into {kind}{merge.base_name}: {place}: {proofs}; "
        f"certificate: {result.certificate.tally()}"
    )
    return result


def _certify(
    merge: Merge, facts: ExportFacts, folder: Path, hashes: Mapping[str, str]
) -> Certificate:
    origin = f"{merge.adapter.where} merged into {merge.base_name}"
    trained = merge.unmerged(folder)
    return certify(
        folder,
        hashes,
        facts=facts,
        origin=origin,
        trained=trained,
        base=merge.base,
        whole=merge.whole,
    )


def _folder_and_facts(merge: Merge) -> tuple[HfFolder, ExportFacts]:
    """Return the folder to be written and its facts. Tokenizer and stop tokens are the adapter's
    where its folder has them, else the base's."""
    own, certificate = merge.adapter.folder, merge.certificate
    tokenizer = own if (own / "tokenizer.json").is_file() else merge.base
    generation = read_json_if_there(own / GENERATION) or read_json_if_there(merge.base / GENERATION)
    stops = token_ids(generation, "eos_token_id", GENERATION)
    stops = stops or token_ids(merge.config, "eos_token_id", "config.json")
    if not stops:
        raise CheckpointError(
            f"{merge.base_name} and {merge.adapter.where} name no stop token (eos_token_id in "
            f"{GENERATION} or config.json), so a server would not stop. Add it to {GENERATION} in "
            f"{own}."
        )
    facts = ExportFacts(
        spec=merge.shapes,
        dtype=merge.out_dtype,
        max_shard_bytes=MAX_SHARD_BYTES,
        stop_ids=tuple(stops),
        base_model=merge.base_name,
        base_folder=str(merge.base),
        card=_card(merge, tokenizer),
        parts=merge.parts,
    )
    if certificate is not None:
        template = certificate.check("chat template").values
        facts = replace(
            facts,
            **_template(template),
            step=certificate.step,
            metrics=dict(certificate.metrics),
            fingerprints=dict(certificate.fingerprints),
        )
    hf = HfFolder(facts.layout, merge.config, generation or None, tokenizer, stops[0])
    return hf, facts


def _template(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the facts about the chat template that the adapter was trained with."""
    if not values:
        return {}
    trained = TrainedTemplate.from_values(values)
    return {
        "template": trained.sha256,
        "tools_template": trained.tools_sha256,
        "template_options": dict(trained.options),
    }


def _card(merge: Merge, tokenizer: Path) -> CardFacts:
    given = merge.adapter.where
    settings = read_json_if_there(tokenizer / "tokenizer_config.json")
    chat = "chat_template" in settings or (tokenizer / "chat_template.jinja").is_file()
    return CardFacts(
        name=Path(given).name,
        base_model=merge.base_name,
        wrapper=merge.wrapper,
        hub_model=hub_name(merge.base_name),
        parameters=sum(torch.Size(shape).numel() for shape in merge.shapes.values()),
        versions={} if merge.certificate is None else merge.certificate.versions,
        chat=chat,
    )
