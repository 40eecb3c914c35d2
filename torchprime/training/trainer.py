"""The trainer: the order of steps from a config to a trained model.

prepare   read, check and plan everything; nothing lasting happens (prepare.py)
start     place the weights, create or continue the run's folder (start.py)
train     run the loop (loop.py)
finish    export, print the changes, write the report (finish.py)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from torchprime.config.schema import TrainConfig
from torchprime.errors import DivergedError
from torchprime.metrics.goodput import EVALUATION, EXPORT, Ledger
from torchprime.text import terminal
from torchprime.training.backend import Backend, StepNumbers
from torchprime.training.finish import (
    account_run,
    export_at_end,
    keep_weights,
    report_run,
    say_changes,
)
from torchprime.training.prepare import Prepared, prepare
from torchprime.training.run.export import Exporter
from torchprime.training.run.folder import FolderLock, folder_of
from torchprime.training.setup.model_files import ModelFiles, pretrained_tensors, random_tensors
from torchprime.training.start import Run, start


class Trainer:
    """Trainer of the config's run (task=train). `SFTTrainer` adds loading before and export after.

    Args:
        config: checked by the schema.
        make_backend: called once the config and the data are known to be right.
        say: prints lines for the user; None is the terminal's stderr, on the first process.
        ledger: of the run's wall clock; None begins one now.
    """

    def __init__(
        self,
        config: TrainConfig,
        make_backend: Callable[[TrainConfig], Backend],
        say: Callable[[str], None] | None = None,
        ledger: Ledger | None = None,
    ) -> None:
        self.ledger = ledger or Ledger()
        self.config, self.make_backend = config, make_backend
        self.say = say or terminal.say

    def run(self) -> StepNumbers | None:
        """Prepare, train and finish; return None after a dry run."""
        with FolderLock(folder_of(self.config)) as lock:
            prepared = prepare(self.config, self.make_backend, self.weights, lock, self.say)
            if self.config.dry_run:
                prepared.say(
                    "dry_run=true: everything above is ready; stopping before the first step."
                )
                return None
            if prepared.complete:
                return self.leave(prepared)
            run = start(prepared, self.ledger)
            with run.tracking:
                try:
                    numbers = run.train()
                except DivergedError as error:
                    raise DivergedError(f"{error} {keep_weights(prepared)}") from error
                self.finish(run, numbers)
                if run.saver is not None:
                    run.saver.require()
            return numbers

    def weights(self, files: ModelFiles) -> Callable[[str], Tensor]:
        """Open the source of initial values: the checkpoint if one is named, else random."""
        if files.folder is None:
            return random_tensors(files, self.config.seed)
        return pretrained_tensors(files, getattr(torch, self.config.torch_dtype))

    def leave(self, prepared: Prepared) -> StepNumbers | None:
        """Report that the run is complete, and return the numbers of its last step."""
        if prepared.export_place is not None:
            prepared.export_place.discard()
            Exporter.require_certified(prepared.export_place)
        prepared.say(f"{prepared.folder} holds this run, complete; there is nothing left to do.")
        return prepared.numbers_before()

    def finish(self, run: Run, numbers: StepNumbers) -> None:
        """Finish after the last step: export, if the config names a place, print changes, write the
        report."""
        prepared, place = run.prepared, run.prepared.export_place
        try:
            if place is not None:
                with self.ledger.at(EXPORT):
                    export_at_end(run, place, numbers.loss)
                with self.ledger.at(EVALUATION):
                    self.show_export(prepared, place.local)
                place.discard()
            say_changes(run)
        finally:  # also of an export that failed its checks
            if prepared.backend.processes.index == 0:
                account_run(run)
                report_run(prepared.folder, prepared.say)

    def show_export(self, prepared: Prepared, out: Path) -> None:
        """Show the result of an export to the user."""
