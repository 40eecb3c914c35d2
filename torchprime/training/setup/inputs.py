"""The inputs of a run: config, model files, chat template and rows, read and checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from torchprime.checkpoint.fisher import FisherFolder
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.regularization import RegularizationConfig
from torchprime.data.templates.render import ChatTemplate
from torchprime.models.decoder import CausalLM
from torchprime.training.setup.adapter import AdaptedTensors, TensorOf
from torchprime.training.setup.datasets import RunData, prepare_run_data, template_of
from torchprime.training.setup.model_files import ModelFiles


@dataclass(frozen=True)
class RunInputs:
    """All that a run reads, except the values of its weights.

    Attributes:
        config: with the date that the template writes, so that a resumed run has the same one.
        template: the chat template; None for a tokenizer without one.
        base: the fingerprint of the base (`ModelFiles.base_fingerprint`), if an adapter or a
            regularization needs it again; None before it was computed.
        fisher: the Fisher information of the base; None if no penalty needs it.
    """

    config: TrainConfig
    files: ModelFiles
    template: ChatTemplate | None
    rows: RunData
    base: str | None = None
    fisher: FisherFolder | None = None

    @classmethod
    def read(
        cls, config: TrainConfig, files: ModelFiles, date: str | None, say: Callable[[str], None]
    ) -> RunInputs:
        """Choose the chat template, then prepare, report and compare all rows.

        Args:
            date: for templates that write one, if the config gives none.

        Raises:
            DataError: an unknown template, rows that can't be used, a leak that the config forbids.
        """
        template = template_of(config.dataset, files.tokenizer, date)
        if template is not None and template.date:
            dataset = replace(config.dataset, template_date=template.date)
            config = replace(config, dataset=dataset)
        rows = prepare_run_data(config, files.tokenizer, template, say)
        return cls(config, files, template, rows)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return getattr(torch, self.config.torch_dtype)

    def model(self) -> CausalLM:
        """Return the model without storage, with its adapter."""
        return self.files.build(self.dtype)

    def values(
        self, open_weights: Callable[[], TensorOf], trained: TensorOf | None = None
    ) -> TensorOf:
        """Return the source of the parameters' values by name.

        Args:
            open_weights: opens the source of the weights; of the base's, under an adapter.
            trained: a checkpoint's values; None starts with the weights, and with the adapter that
                the config names or a new one.
        """
        adapter = self.files.adapter
        if adapter is None:
            return open_weights() if trained is None else trained
        started = None if adapter.start is None else adapter.start.tensors.__getitem__
        return AdaptedTensors(
            self.model(),
            adapter.spec,
            open_weights(),
            trained=started if trained is None else trained,
            seed=self.config.seed,
            dtype=self.dtype,
        )

    @property
    def micro_batch_size(self) -> int:
        """Blocks per forward pass, over all devices."""
        return self.config.task.micro_batch_size

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """The tokens that end an answer."""
        return tuple(sorted({self.files.tokenizer.eos_id, *self.rows.train.stop_ids()}))

    def identity(self) -> dict[str, str | None]:
        """Return the fingerprints of the inputs of a run's steps."""
        model = {"model": self.files.fingerprint(), "base": self.base}
        fisher = {"fisher": None if self.fisher is None else self.fisher.sha256}
        return {**model, **fisher, **self.rows.fingerprints()}


def open_fisher(config: RegularizationConfig, files: ModelFiles) -> FisherFolder | None:
    """Return the folder that the config names, whose weights are those of the model; None if it
    names none.

    Raises:
        CheckpointError: no such folder, a damaged one, or one of another model.
    """
    if config.ewc.fisher is None:
        return None
    fisher = FisherFolder(Path(config.ewc.fisher))
    fisher.check_shapes(files.shapes)
    return fisher
