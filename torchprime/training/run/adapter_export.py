"""The export of a trained adapter: a PEFT folder, a merged Hugging Face folder, or both.

Of both, the PEFT folder lies in `adapter/` of the merged one, so that one rename makes all of it
visible.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor

from torchprime.checkpoint.adapter.certificate import certify_adapter
from torchprime.checkpoint.adapter.export import (
    export_adapter,
    merged_weights,
)
from torchprime.checkpoint.adapter.folder import AdapterFolder
from torchprime.checkpoint.adapter.logits import checkpoint_logits
from torchprime.checkpoint.export import (
    ExportResult,
    check_export,
    export_need,
    write_export,
    write_weights,
)
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.whole import WholeFolder, WholeModel
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.proof.certificate import Certificate, certify
from torchprime.checkpoint.proof.logits import PromptLogits
from torchprime.checkpoint.room import Need
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.training.setup.adapter import ExportForm, TensorOf

INSIDE = "adapter"  # the PEFT folder in a merged one


@dataclass(frozen=True)
class AdapterExport:
    """An adapter's export, before its tensors are known.

    Attributes:
        hf: the folder that an export of the merged model is.
        facts: of the run, with `facts.adapter`.
        base: the folder of the base's weights.
        open_base: opens the base's files and returns a function that gives a weight by name, with
            rows for new tokens; called only when weights are needed.
        whole: the model around the text model, if all of it is exported merged.
    """

    form: ExportForm
    hf: HfFolder
    facts: ExportFacts
    base: Path
    open_base: Callable[[], TensorOf]
    whole: WholeModel | None = None

    @property
    def peft(self) -> AdapterFolder:
        """The PEFT folder."""
        return AdapterFolder.of(self.hf, self.facts)

    @property
    def merged(self) -> HfFolder | WholeFolder:
        """The folder of the merged model."""
        return self.hf if self.whole is None else WholeFolder(self.hf, self.whole)

    def check(self, out: Path | ExportPlace) -> list[str]:
        """Raise the errors that `write` would raise, without weights; return the repairs made in
        the source's files, as lines for the user."""
        if self.form == "adapter":
            return check_export(out, self.peft)
        lines = check_export(out, self.merged)
        if self.form == "both":
            self.peft.check()
        return lines

    def need(self, place: ExportPlace) -> Need:
        """Return the disk space that an export there needs."""
        if self.form == "merged":
            return export_need(place, self.merged.layout)
        small = export_need(place, self.peft.layout)
        if self.form == "adapter":
            return small
        merged = export_need(place, self.merged.layout)
        return merged._replace(bytes=merged.bytes + small.bytes, files=merged.files + small.files)

    def write(
        self,
        place: ExportPlace,
        trained: Mapping[str, Tensor],
        logits: PromptLogits | str,
        origin: str,
    ) -> ExportResult:
        """Write and prove the export.

        Args:
            trained: the trained tensors by their names in the adapted model.
            logits: the trainer's, or the reason why there are none.
            origin: where the tensors come from, for people.

        Raises:
            CheckpointError: it could not be written, or a check failed; in the latter case the
                folder is there, with the failed certificate.
        """
        proof = _Proof(self, logits, origin)
        if self.form == "adapter":
            result = export_adapter(
                place,
                self.peft,
                facts=self.facts,
                weights=trained.items(),
                origin=origin,
                trained=logits,
                base=self.base,
            )
        else:
            result = write_export(
                place,
                small_files=partial(self._small_files, trained, proof),
                weights=merged_weights(self.peft, trained, self.open_base()),
                layout=self.hf.layout,
                certify=proof.certify_merged,
                whole=self.whole,
            )
        for certificate in (proof.inside, result.certificate):
            if certificate is not None:
                certificate.require(place)
        return result

    def write_checkpoint(self, place: ExportPlace, reader: CheckpointReader) -> ExportResult:
        """Write and prove the export of a checkpoint of the run, without a device.

        Raises:
            CheckpointError: see `write`.
        """
        trained = {name: reader.get(f"model.{name}") for name in self.peft.parts.shapes}
        logits = checkpoint_logits(
            self.facts, self.hf.config, self.open_base(), trained, self.hf.tokenizer_folder
        )
        return self.write(place, trained, logits, f"{reader.name} of {self.facts.source}")

    def _small_files(self, trained: Mapping[str, Tensor], proof: _Proof, folder: Path) -> None:
        self.hf.write_small_files(folder, card=self.facts.card_text())
        if self.form == "both":
            inside = folder / INSIDE
            inside.mkdir()
            self.peft.write_small_files(inside, self.facts)
            hashes = write_weights(inside, self.peft.renamed(trained.items()), self.peft.layout)
            proof.certify_inside(inside, hashes)


class _Proof:
    """The certificates of one export."""

    def __init__(self, export: AdapterExport, logits: PromptLogits | str, origin: str) -> None:
        self.export, self.logits, self.origin = export, logits, origin
        self.inside: Certificate | None = None

    def certify_inside(self, folder: Path, hashes: Mapping[str, str]) -> None:
        """Certify the PEFT folder in a merged one."""
        self.inside = certify_adapter(
            folder,
            hashes,
            adapter=self.export.peft,
            facts=self.export.facts,
            origin=self.origin,
            trained=self.logits,
            base=self.export.base,
        )

    def certify_merged(self, folder: Path, hashes: Mapping[str, str]) -> Certificate:
        """Certify the merged folder."""
        return certify(
            folder,
            hashes,
            facts=self.export.facts,
            origin=self.origin,
            trained=self.logits,
            base=self.export.base,
            whole=self.export.whole,
        )
