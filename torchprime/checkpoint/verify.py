"""Proof that an export is what was trained: its bytes read back, and its logits in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM
from transformers.utils import logging as hf_logging

from torchprime.checkpoint.hf_read import SafetensorsReader
from torchprime.checkpoint.portable_config import config_if_refused
from torchprime.checkpoint.safetensors_write import tensor_hash
from torchprime.errors import CheckpointError
from torchprime.json_files import read_json


def read_back(out: Path, expected_hashes: Mapping[str, str]) -> None:
    """Read every tensor from the files and compare it with what was handed over for export.

    Raises:
        CheckpointError: naming the tensors that are missing, unexpected or different.
    """
    reader = SafetensorsReader(out)
    found = reader.names()
    absent = [name for name in expected_hashes if name not in found]
    strange = [name for name in found if name not in expected_hashes]
    wrong = [
        name
        for name, expected in expected_hashes.items()
        if name in found and tensor_hash(reader.get(name)) != expected
    ]
    if absent or strange or wrong:
        raise CheckpointError(
            f"The export in {out} read back is not what was trained: different "
            f"{_some(wrong)}; missing {_some(absent)}; unexpected {_some(strange)}. The disk or "
            "file system is not to be trusted: do not use this folder."
        )


def _some(names: list[str]) -> str:
    return f"{len(names)} ({', '.join(names[:5])})" if names else "none"


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """Loading takes a moment; its bar would break up the run's own lines."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def load_transformers(folder: Path) -> Any:
    """The folder's model in transformers, on the CPU, in its own dtype, every weight accounted for.

    Raises:
        CheckpointError: transformers reports missing, unexpected or mismatched weights (left to
            itself it only warns, and fills in random ones), or cannot load the folder at all.
    """
    config = read_json(Path(folder) / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    unchecked = config_if_refused(config)
    given = {} if unchecked is None else {"config": unchecked}
    try:
        with _no_progress_bar():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=getattr(torch, name),
                local_files_only=True,
                use_safetensors=True,
                attn_implementation="sdpa",
                output_loading_info=True,
                **given,
            )
    except Exception as error:  # it raises nearly anything for a damaged folder
        first = (str(error).splitlines() or ["no text"])[0]
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load the model in {folder}: "
            f"{type(error).__name__}: {first}"
        ) from error
    model, report = loaded
    bad = {kind: sorted(map(str, entries)) for kind, entries in report.items() if entries}
    if bad:
        raise CheckpointError(f"transformers does not load {folder} as a whole: {bad}")
    return model.eval()


def transformers_logits(folder: Path, input_ids: np.ndarray) -> np.ndarray:
    """Logits [B, S, V] in fp32 of the folder's model in transformers, for rows without padding."""
    model = load_transformers(folder)
    ids = torch.as_tensor(np.asarray(input_ids), dtype=torch.long)
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits.float().numpy()


def compare_logits(
    folder: Path, input_ids: np.ndarray, trained: np.ndarray, *, tolerance: float
) -> float:
    """Compare the trainer's logits with those of the exported folder in transformers.

    Returns:
        The largest difference, relative to the largest logit.

    Raises:
        CheckpointError: the difference is above the tolerance, or not a number.
    """
    exported = transformers_logits(folder, input_ids)
    if exported.shape != trained.shape:
        raise CheckpointError(
            f"The trainer's logits have shape {trained.shape}, the export's {exported.shape}."
        )
    difference = float(np.abs(exported - trained).max() / np.abs(exported).max())
    if not difference <= tolerance:
        raise CheckpointError(
            f"The export in {folder} computes something else than the trained model: logits differ "
            f"by {difference:.2e} of the largest, allowed is {tolerance:.0e}."
        )
    return difference
