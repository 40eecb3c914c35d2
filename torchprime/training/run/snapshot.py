"""The snapshot of a run after a step: all that a checkpoint stores besides the tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torchprime.checkpoint.run.manifest import Manifest
from torchprime.checkpoint.run.storage import FolderWriter
from torchprime.metrics.writers import Writer
from torchprime.training.run.export import Exporter


@dataclass(frozen=True)
class Snapshot:
    """All of a checkpoint but its tensors.

    Attributes:
        manifest: all that a resume needs except the tensors. `Saver` adds the best checkpoint.
        exporter: writes the files of an export that the checkpoint stores; None stores none.
        export_weights: true stores the weights of that export, too.
        writers: of records, which have to be on the disk before the checkpoint gets its name.
    """

    manifest: Manifest
    exporter: Exporter | None = None
    export_weights: bool = False
    writers: Sequence[Writer] = ()

    @property
    def step(self) -> int:
        return self.manifest.step

    @property
    def scores(self) -> Mapping[str, float]:
        """Measured on held-out rows after exactly this step; empty if there are none."""
        return self.manifest.scores

    def complete(self, writer: FolderWriter) -> None:
        """Write what a checkpoint needs besides tensors and manifest: the files of an export, and
        the records so far."""
        if self.exporter is not None:
            metrics, weights = self.manifest.metrics, self.export_weights
            self.exporter.keep(writer, step=self.step, metrics=metrics, weights=weights)
        for records in self.writers:
            records.sync()
