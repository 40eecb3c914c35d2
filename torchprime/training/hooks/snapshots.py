"""The source of a run's snapshots: its hooks know the metrics and what a resume has to restore."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torchprime.evaluation.selection import Evaluated, with_base
from torchprime.training.hooks.evaluation import EvaluationHook
from torchprime.training.hooks.metrics import MetricsHook
from torchprime.training.prepare import Prepared
from torchprime.training.run.facts import make_manifest, metrics_at
from torchprime.training.run.snapshot import Snapshot


class Snapshots:
    """Source of the snapshots of one run.

    Args:
        evaluations: None for a run without held-out rows.
    """

    def __init__(
        self, prepared: Prepared, metrics: MetricsHook, evaluations: EvaluationHook | None
    ) -> None:
        self.prepared, self.metrics, self.evaluations = prepared, metrics, evaluations

    @property
    def history(self) -> Sequence[Evaluated]:
        """The evaluations so far."""
        return [] if self.evaluations is None else self.evaluations.history

    def scores(self, step: int) -> dict[str, float]:
        """Return the scores measured after exactly this step, with the base's; {} if there are
        none."""
        scores = {} if self.evaluations is None else self.evaluations.scores_after(step)
        return with_base(scores, self.history[0].scores) if scores else {}

    def metrics_at(self, step: int, loss: float, loss_step: int) -> dict[str, float]:
        """Return the metrics of the weights after a step, for an export of them."""
        return metrics_at(step, loss, loss_step, self.history)

    def take(self, step: int) -> Snapshot:
        """Return the snapshot after a step."""
        snapshot = self.take_late(step)
        manifest = replace(snapshot.manifest, scores=self.scores(step))
        return replace(snapshot, manifest=manifest, writers=self.metrics.writers)

    def take_late(self, step: int) -> Snapshot:
        """Return a snapshot for a checkpoint outside the selection, after the end of the loop, when
        the writers are closed."""
        p, last = self.prepared, self.metrics.last
        manifest = make_manifest(
            p,
            step,
            # There is no record right after a resume.
            metrics={} if last is None else self.metrics_at(step, last.loss, last.step),
            hooks={} if self.evaluations is None else self.evaluations.remembered(),
        )
        return Snapshot(manifest, p.exporter, p.config.checkpoint.hf)
