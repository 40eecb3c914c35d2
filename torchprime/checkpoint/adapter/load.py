"""A folder's model in transformers, for commands that generate: whole, or a base with its adapter.

An adapter is merged into the base in memory. So it needs neither PEFT nor room on a disk, and its
answers are those of the merged model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from torchprime.adapters.peft_format import CONFIG_NAME
from torchprime.checkpoint.adapter.merged_export import Merge
from torchprime.checkpoint.adapter.read import StoredAdapter, read_adapter
from torchprime.checkpoint.hf.source import resolve_adapter, resolve_pretrained
from torchprime.checkpoint.hf.weight_names import EMBEDDING, in_loaded
from torchprime.checkpoint.proof.verify import load_transformers
from torchprime.errors import CheckpointError


def resolve_model(name_or_path: str) -> Path:
    """Find or download the folder of a model or of a PEFT adapter.

    Args:
        name_or_path: a local folder, or the name of a hub repository (`owner/name`).

    Raises:
        CheckpointError: as `resolve_pretrained` and `resolve_adapter`.
    """
    folder = resolve_pretrained(name_or_path, cache_dir=None, weights=False)
    if is_adapter(folder):
        return resolve_adapter(name_or_path, cache_dir=None)
    return resolve_pretrained(name_or_path, cache_dir=None, weights=True)


def is_adapter(folder: Path) -> bool:
    """Return True for a PEFT folder; a whole model beside an adapter is none."""
    return (folder / CONFIG_NAME).is_file() and not (folder / "config.json").is_file()


def load_model(folder: Path) -> Any:
    """Load a folder's model in transformers, on the CPU; an adapter with the base that it names.

    Raises:
        CheckpointError: transformers can't load the folder; a base that is not here, or that the
            adapter does not fit.
    """
    if not is_adapter(folder):
        return load_transformers(folder)
    adapter = read_adapter(folder)
    merge = Merge(adapter, _base_of(adapter), str(adapter.base))
    merge.check()
    model = load_transformers(merge.base, merge.out_dtype)
    rows = merge.shapes[EMBEDDING][0]
    if rows != model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(rows, mean_resizing=False)
    held = model.state_dict()
    wrapper = merge.wrapper is not None
    with torch.no_grad():
        for name in merge.shapes:
            held[in_loaded(name, wrapper=wrapper)].copy_(merge.tensor_of(name))
    return model


def _base_of(adapter: StoredAdapter) -> Path:
    if adapter.base is None:
        raise CheckpointError(
            f"{adapter.where}: {CONFIG_NAME} names no base (base_model_name_or_path). Merge the "
            "adapter: torchprime export --adapter DIR --base BASE --merge --out NEW."
        )
    try:
        return resolve_pretrained(adapter.base, cache_dir=None, weights=True)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error} It is the base of the adapter {adapter.where}; if it is elsewhere by now, "
            "merge the adapter: torchprime export --adapter DIR --base BASE --merge --out NEW."
        ) from error
