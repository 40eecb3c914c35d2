"""The numbers of a folder's weights, and the check of the parts beside a whole model's text."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.weight_names import HEAD, inner_names
from torchprime.checkpoint.hf.write import hash_of_all, weight_hashes
from torchprime.checkpoint.proof.entries import WeightsValues
from torchprime.errors import CheckpointError
from torchprime.files.json_files import read_json
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM

OTHER_PARTS = "other parts"  # the name of the check


def weights_values(reader: SafetensorsReader, hashes: Mapping[str, str]) -> WeightsValues:
    """Return the number of tensors and values, the dtypes, and one hash of all weights that does
    not depend on how they are split into files."""
    listing = reader.names()
    dtypes: dict[str, int] = {}
    for _, dtype in listing.values():
        name = str(dtype).removeprefix("torch.")
        dtypes[name] = dtypes.get(name, 0) + 1
    return {
        "tensors": len(listing),
        "parameters": sum(math.prod(shape) for shape, _ in listing.values()),
        "dtypes": dtypes,
        "sha256": hash_of_all(hashes),
    }


def check_other_parts(folder: Path, base: Path | None) -> tuple[str, WeightsValues]:
    """Check that all tensors but the text model's are those of the base, bit for bit.

    Args:
        base: None only hashes them.
    """
    values, hashes = _other_parts(folder)
    told = f"{values['tensors']} tensors beside the text model's"
    if base is None:
        return told, values
    _, theirs = _other_parts(base)
    if wrong := sorted(n for n in {**hashes, **theirs} if hashes.get(n) != theirs.get(n)):
        raise CheckpointError(
            f"{len(wrong)} of {len(theirs)} tensors beside the text model's are not the base's: "
            f"{', '.join(wrong[:3])}"
        )
    return f"{told} are the base's, bit for bit", values


def _other_parts(folder: Path) -> tuple[WeightsValues, dict[str, str]]:
    """Return the numbers and the hashes of the tensors that are not the text model's."""
    config = read_json(folder / "config.json")
    with torch.device("meta"):
        of_text = dict(CausalLM(architecture_from_hf(config)).named_parameters())
    reader = SafetensorsReader(folder, stored_names=True)
    inner = inner_names(reader.names()).items()
    reader.leave_out([n for n, name in inner if name in of_text or name == HEAD])
    hashes = weight_hashes(reader)
    return weights_values(reader, hashes), hashes
