"""The model that a command is given instead of the config's: a Hugging Face or a PEFT folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TypedDict

from torchprime.adapters.peft_format import WEIGHTS_NAME
from torchprime.checkpoint.adapter.load import is_adapter, resolve_model
from torchprime.checkpoint.adapter.read import read_adapter
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.adapter import AdapterConfig
from torchprime.errors import CheckpointError
from torchprime.files.hashing import hash_file
from torchprime.training.setup.model_files import ModelFiles


class Fingerprint(TypedDict, total=False):
    """The sha256 of all weights (`ModelFiles.base_fingerprint`), and of an adapter's file."""

    weights: str
    adapter: str


def with_model(config: TrainConfig, given: str) -> TrainConfig:
    """Return the config with this model instead of its own; no weight is read.

    A PEFT folder is put beside the base that the config names, or else beside the one that the
    folder names.

    Args:
        given: a folder, or a hub repository (`owner/name`).

    Raises:
        CheckpointError: no such folder, one without a model, or an adapter without a base.
    """
    folder = str(resolve_model(given))
    # Groups of parameters may name those of the config's adapter, and only matter to updates.
    task = replace(config.task, optimizer=replace(config.task.optimizer, groups=[]))
    config = replace(config, task=task)
    model, export = config.model, replace(config.export, adapter="merged")
    if not is_adapter(Path(folder)):
        own = replace(model, pretrained_model=folder, tokenizer_name=None, architecture=None)
        return replace(config, model=own, adapter=AdapterConfig(), export=export)
    adapter = replace(config.adapter, pretrained=folder)
    if model.pretrained_model not in (None, given):
        return replace(config, adapter=adapter)
    base = read_adapter(folder).base
    if base is None:
        raise CheckpointError(
            f"{given} names no base, and neither does the config. Set model.pretrained_model to "
            "the model that this adapter was trained on."
        )
    model = replace(model, pretrained_model=base, architecture=None)
    return replace(config, model=model, adapter=adapter)


def fingerprint_of(files: ModelFiles) -> Fingerprint:
    """Return the hashes of a model's files; it reads them all."""
    found: Fingerprint = {"weights": files.base_fingerprint()}
    if files.adapter is not None and files.adapter.start is not None:
        path = files.adapter.start.folder / WEIGHTS_NAME
        found["adapter"] = hash_file(path)["sha256"]
    return found
