"""The export at the end of a run: weights become a Hugging Face folder, which is verified.

Before the folder gets its final name, the files are read back and every tensor's bytes must be
those that left the device; transformers, loading the folder, must compute the logits that the
trainer computes; and the certificate lists further checks. The logits need the model in host
memory, so they are compared only if there is room; otherwise this is reported.

A checkpoint stores the small files and the facts of an export, so that it can be exported later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from torchprime.checkpoint.export import ExportResult, check_export, export_hf, export_need
from torchprime.checkpoint.from_checkpoint import HF, Choice, add_weights, export_checkpoint
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.export_facts import FACTS, ExportFacts
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.whole import WholeFolder, WholeModel
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.proof.certificate import certify
from torchprime.checkpoint.proof.logits import PromptLogits, no_room, prompt_ids
from torchprime.checkpoint.room import Need
from torchprime.checkpoint.run.reader import CheckpointReader, TensorReader
from torchprime.checkpoint.run.storage import FolderWriter, Storage
from torchprime.data.templates.render import ChatTemplate, text_hash
from torchprime.files.atomic import write_json
from torchprime.files.json_files import token_ids
from torchprime.training.backend import Backend
from torchprime.training.run.adapter_export import AdapterExport
from torchprime.training.setup.model_files import ModelFiles, pretrained_tensors

BASE = "base"  # the fingerprint of an adapter's base


class Exporter:
    """Writer of verified exports of one run's model."""

    def __init__(
        self,
        files: ModelFiles,
        *,
        layout: WeightLayout,
        card: CardFacts,
        template: ChatTemplate | None,
        stop_ids: Sequence[int],
        fingerprints: Mapping[str, str | None],
        say: Callable[[str], None],
    ) -> None:
        self.files, self.layout = files, layout
        self.card, self.fingerprints, self.say = card, fingerprints, say
        self.template, self.stop_ids = template, stop_ids

    def need(self, place: ExportPlace) -> Need:
        """Return the disk space that an export there needs."""
        if (adapted := self._adapted(self.facts(None, {}))) is not None:
            return adapted.need(place)
        return export_need(place, self._exported().layout)

    def check(self, out: Path | ExportPlace) -> None:
        """Raise the errors that `write` would raise about the target, before the run.

        What the export repairs in the source's files is said, once.
        """
        adapted = self._adapted(self.facts(None, {}))
        lines = check_export(out, self._exported()) if adapted is None else adapted.check(out)
        for line in lines:
            self.say(f"note: {line}")

    @property
    def whole(self) -> WholeModel | None:
        """The model around the trained text model, if all parts are exported."""
        if self.files.parts == "text":
            return None
        assert self.files.folder is not None  # `files_of` refuses others
        return WholeModel(self.files.folder)

    def _exported(self) -> HfFolder | WholeFolder:
        """Return the folder of the model that is exported."""
        whole = self.whole
        return self.hf_folder() if whole is None else WholeFolder(self.hf_folder(), whole)

    @staticmethod
    def require_certified(place: ExportPlace) -> None:
        """Raise the CheckpointError of an existing export that failed its checks."""
        if (certificate := place.certificate()) is not None:
            certificate.require(place)

    def facts(self, step: int | None, metrics: Mapping[str, Any]) -> ExportFacts:
        """Return the facts that an export of the weights after `step` updates needs."""
        template = self.template
        folder, new_rows = self.files.folder, self.files.new_rows
        return ExportFacts(
            spec=dict(self.layout.spec),
            dtype=self.layout.dtype,
            max_shard_bytes=self.layout.max_shard_bytes,
            stop_ids=tuple(sorted({self.files.tokenizer.eos_id, *self.stop_ids})),
            template=None if template is None else text_hash(template.text),
            tools_template=None if template is None else text_hash(template.for_tools([{}]).text),
            template_options={} if template is None else template.option_values,
            base_model=self.card.base_model,
            base_folder=None if folder is None else str(folder.absolute()),
            unused_rows=new_rows.unused if new_rows else (),
            step=step,
            card=replace(self.card, chat=template is not None),
            metrics=dict(metrics),
            fingerprints=dict(self.fingerprints),
            adapter=self.files.adapter and self.files.adapter.spec,
            base_sha256=self.fingerprints.get(BASE),
            parts=self.files.parts,
        )

    def _adapted(self, facts: ExportFacts) -> AdapterExport | None:
        """Return the export of the run's adapter; None if it trains all weights."""
        adapter, base = self.files.adapter, self.files.folder
        if adapter is None:
            return None
        assert base is not None  # the schema guarantees it
        open_base = partial(pretrained_tensors, self.files, self.layout.dtype)
        return AdapterExport(adapter.form, self.hf_folder(), facts, base, open_base, self.whole)

    def write_small_files(self, folder: Path, *, step: int, metrics: Mapping[str, Any]) -> None:
        """Write the part of an export that a checkpoint stores: the facts and all files but the
        weights."""
        facts = self.facts(step, metrics)
        self.hf_folder().write_small_files(folder, replace(facts, parts="text").card_text())
        write_json(folder / FACTS, facts.to_dict())

    def keep(
        self, writer: FolderWriter, *, step: int, metrics: Mapping[str, Any], weights: bool
    ) -> None:
        """Write a checkpoint's hf/, with the weights too if requested; its tensors are already
        written."""
        with writer.local_folder(HF) as folder:
            self.write_small_files(folder, step=step, metrics=metrics)
            if not weights:
                return
            with TensorReader(*writer.where) as reader:
                found = ((name, reader.get(f"model.{name}")) for name in self.layout.spec)
                certificate = add_weights(folder, found)
        if certificate.failed:  # no reason to lose the checkpoint, which does not need them
            told = "; ".join(f"{check.name}: {check.detail}" for check in certificate.failed)
            self.say(f"the weights in {HF}/ of step {step} failed their certificate: {told}")

    def write_sharded(self, place: ExportPlace, backend: Backend) -> None:
        """Write the weights in shards instead (convert_to_safetensors=false), unconverted and
        unverified."""
        with place.folder() as folder:
            backend.save_sharded(str(folder))
        self.say(
            f"wrote shards to {place} (torch.distributed.checkpoint, not a Hugging Face folder)"
        )

    def write(
        self,
        out: Path | ExportPlace,
        backend: Backend,
        metrics: Mapping[str, Any],
        *,
        step: int | None,
        prove_logits: bool = True,
        others_wait: Callable[[], None] = lambda: None,
    ) -> ExportResult | None:
        """Export the backend's weights to `out` and verify it; other processes only pass their
        shards.

        Every process takes part in computing logits and in bringing a sharded tensor to a host, so
        all do the same of these in the same order, also where the first one fails to write.

        Args:
            metrics: the last values, for card and certificate.
            step: updates made; None if unknown.
            prove_logits: false leaves them out, where the weights may compute no finite ones.
            others_wait: called on the first process when the others have handed over all.

        Raises:
            CheckpointError: it could not be written, or a check of the certificate failed; in the
                latter case the folder is there, with the failed certificate.
        """
        trained = self._trained_logits(backend) if prove_logits else "the run diverged"
        place = ExportPlace.of(out)
        weights = backend.weights()
        if backend.processes.index == 0:
            weights = _then(weights, others_wait)
        facts = self.facts(step, metrics)
        adapted = self._adapted(facts)
        try:
            if backend.processes.index != 0:
                return None
            if adapted is None:
                result = self._export(place, weights, facts, trained)
            else:
                origin = f"{facts.source}, at its end"
                result = adapted.write(place, dict(weights), trained, origin)
        finally:
            if backend.processes.count > 1:
                for _ in weights:  # the rest of this process's part in gathering the weights
                    pass
        self._told(place, result)
        return result

    def write_checkpoint(
        self, place: ExportPlace, storage: Storage, name: str, base: Path | None
    ) -> None:
        """Export a checkpoint of the run and verify it, without a device.

        Args:
            base: the folder of the base's weights; None if training began from random ones.

        Raises:
            CheckpointError: see `write`.
        """
        if self.files.adapter is None:
            choice = Choice(parts=self.files.parts)
            export_checkpoint(storage, name, place, choice=choice, base=base, say=self.say)
            return
        with CheckpointReader(storage, name) as reader:
            manifest = reader.manifest
            adapted = self._adapted(self.facts(manifest.step, manifest.metrics))
            assert adapted is not None
            self._told(place, adapted.write_checkpoint(place, reader))

    def _told(self, place: ExportPlace, result: ExportResult) -> None:
        """Say what was exported; raise the error of a failed certificate."""
        certificate = result.certificate
        assert certificate is not None
        certificate.require(place)
        proofs = (certificate.check(name).detail for name in ("weights", "logits"))
        self.say(f"exported to {place}: {'; '.join(proofs)}; certificate: {certificate.tally()}")

    def _export(
        self,
        place: ExportPlace,
        weights: Iterator[tuple[str, Tensor]],
        facts: ExportFacts,
        trained: PromptLogits | str,
    ) -> ExportResult:
        return export_hf(
            place,
            self.hf_folder(),
            card=facts.card_text(),
            weights=weights,
            certify=partial(
                certify,
                facts=facts,
                origin=f"{facts.source}, at its end",
                trained=trained,
                base=self.files.folder,
                whole=self.whole,
            ),
            whole=self.whole,
        )

    def hf_folder(self) -> HfFolder:
        """Return the folder that an export writes."""
        return HfFolder(
            layout=self.layout,
            config=self.files.hf_config,
            generation_config=self._generation_config(),
            tokenizer_folder=self.files.tokenizer.folder,
            eos_token_id=self.files.tokenizer.eos_id,
            chat_templates=None if self.template is None else self.template.texts,
        )

    def _generation_config(self) -> dict[str, Any] | None:
        """Return the source's generation config with the trained stop tokens: a server reads them
        there."""
        found = self.files.generation_config()
        trained = [i for i in self.stop_ids if i != self.files.tokenizer.eos_id]
        if not trained:
            return found
        source = found if found and found.get("eos_token_id") is not None else self.files.hf_config
        stops = token_ids(source, "eos_token_id", "generation_config.json or config.json")
        return {**(found or {}), "eos_token_id": list(dict.fromkeys([*stops, *trained]))}

    def _trained_logits(self, backend: Backend) -> PromptLogits | str:
        """Return the trainer's logits for the prompts, or the reason why transformers can't be
        compared.

        Room is one host's matter, so several processes compute them all the same.
        """
        reason = no_room(self.layout.num_parameters, self.layout.dtype)
        if reason and backend.processes.count == 1:
            return reason
        logits = np.stack([backend.logits(ids).numpy() for ids in self._prompts.tolist()])
        where = f"the trainer ({backend.name}, {backend.device_count} x {backend.device_kind})"
        return reason or PromptLogits(self._prompts, logits, where)

    @cached_property
    def _prompts(self) -> np.ndarray:
        return prompt_ids(self.files.tokenizer.folder, self.files.architecture)


def _then(
    weights: Iterator[tuple[str, Tensor]], after: Callable[[], None]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights, and call `after` when the last one was taken."""
    yield from weights
    after()
