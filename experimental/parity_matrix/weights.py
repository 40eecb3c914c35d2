"""The trained tensors of two runs of the matrix, compared after their last step."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from torchprime.adapters.peft_format import WEIGHTS_NAME, model_tensors
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader

WITNESS_FOLDER = "adapter"  # where the witness saves PEFT's folder
MODEL = "model."  # in names of a checkpoint's tensors


def trained_tensors(run: Path, step: int) -> dict[str, Tensor]:
    """Return the trained tensors after a step, by their names in the adapted model: from a
    checkpoint of ours, or from the folder that PEFT wrote for the witness after its last step."""
    peft = run / WITNESS_FOLDER / WEIGHTS_NAME
    if peft.is_file():
        return model_tensors(load_file(peft), str(run))
    with CheckpointReader(open_storage(run / "checkpoints"), Catalog.name_of(step)) as reader:
        names = [name for name in reader.tensor_names() if name.startswith(MODEL)]
        return {name.removeprefix(MODEL): reader.get(name) for name in names}


def largest_difference(run: Path, reference: Path, step: int) -> float:
    """Return the largest difference of a tensor, as the norm of the difference over the tensor's
    norm in the reference.

    Raises:
        KeyError: the run did not train a tensor of the reference.
    """
    found, expected = trained_tensors(run, step), trained_tensors(reference, step)
    norm = torch.linalg.vector_norm
    return max(float(norm(found[name] - t) / norm(t)) for name, t in expected.items())
