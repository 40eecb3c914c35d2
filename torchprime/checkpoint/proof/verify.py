"""Verification of an export: its bytes are read back, and its logits in transformers are
compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging as hf_logging

from torchprime.checkpoint.hf.portable_config import config_if_refused
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.write import tensor_hash
from torchprime.errors import CheckpointError
from torchprime.files.json_files import read_json
from torchprime.models.families import FAMILIES, SCORES_SOFTCAP, is_wrapper, text_part

# Two programs that compute the same model differ by the sum of their roundings, each about as large
# as the floor of `rounding_floor`. Measured over 120 models (2 to 32 layers, two families, bf16 and
# fp32, small and large weights): 0.4 to 1.75 times the floor; the floors were 6e-3 to 7e-2 in bf16.
MARGIN = 3
MOST = 0.3  # of the largest logit; another model's logits differ by about 1


class NotChecked(Exception):
    """Error for a check that can't be made; the text gives the reason."""


class LogitsMatch(NamedTuple):
    """The difference between two programs' logits, relative to the largest logit.

    Attributes:
        floor: the difference that rounding makes, where it was measured.
    """

    difference: float
    tolerance: float
    floor: float | None

    @property
    def within(self) -> bool:
        return self.difference <= self.tolerance  # False for NaN

    def allowed(self) -> str:
        """Return the tolerance, in words."""
        told = f"allowed is {self.tolerance:.0e}"
        if self.floor is None:
            return told
        return f"{told}, {MARGIN} times what rounding does to this model"


def read_back(out: Path, expected_hashes: Mapping[str, str]) -> None:
    """Read every tensor from the files and compare it with the one passed in for export.

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
    """Hide the progress bar of loading, which would break up the run's own lines."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def load_transformers(folder: Path, dtype: torch.dtype | None = None) -> Any:
    """Load the folder's model in transformers, on the CPU, and check for missing weights.

    Args:
        dtype: of its weights; None for the folder's own.

    Raises:
        CheckpointError: transformers reports missing, unexpected or mismatched weights (left to
            itself it only warns, and fills in random ones), or cannot load the folder at all.
    """
    config = read_json(Path(folder) / "config.json")
    name = config.get("dtype") or config.get("torch_dtype") or "float32"
    unchecked = config_if_refused(config)
    given = {} if unchecked is None else {"config": unchecked}
    auto: Any = AutoModelForImageTextToText if is_wrapper(config) else AutoModelForCausalLM
    try:
        with _no_progress_bar():
            loaded: Any = auto.from_pretrained(
                folder,
                dtype=dtype or getattr(torch, name),
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                attn_implementation=attention_of(config),
                output_loading_info=True,
                **given,
            )
    except Exception as error:  # transformers raises nearly any exception for a damaged folder
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


def attention_of(config: Mapping[str, Any]) -> str:
    """Return the attention of transformers that computes the model of a config.json: torch's has no
    soft-cap of the scores."""
    family = FAMILIES.get(str(text_part(config).get("model_type")))
    capped = family is not None and SCORES_SOFTCAP in family.softcaps
    return "eager" if capped else "sdpa"


def logits_of(model: Any, input_ids: np.ndarray) -> np.ndarray:
    """Return the logits [B, S, V], in fp32 at least, of a model in transformers, for rows without
    padding."""
    ids = torch.as_tensor(np.asarray(input_ids), dtype=torch.long)
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).numpy()


def compare_logits(
    folder: Path, input_ids: np.ndarray, trained: np.ndarray, *, least: float
) -> LogitsMatch:
    """Compare the trainer's logits with those of the exported folder in transformers.

    Args:
        least: see `judge_logits`.

    Raises:
        CheckpointError: the difference is above what is allowed, or not a number.
        NotChecked: see `judge_logits`.
    """
    model = load_transformers(folder)
    exported = logits_of(model, input_ids)
    if exported.shape != trained.shape:
        raise CheckpointError(
            f"The trainer's logits have shape {trained.shape}, the export's {exported.shape}."
        )
    difference = float(np.abs(exported - trained).max() / np.abs(exported).max())
    match = judge_logits(model, input_ids, exported, difference, least)
    if match.within:
        return match
    raise CheckpointError(
        f"The export in {folder} computes something else than the trained model: logits differ "
        f"by {difference:.2e} of the largest, {match.allowed()}."
    )


def judge_logits(
    model: Any, input_ids: np.ndarray, logits: np.ndarray, difference: float, least: float
) -> LogitsMatch:
    """Return the largest accepted difference to another program's logits, and raise if this one is
    larger.

    Two programs round in different orders. How far that moves the logits depends on dtype, depth
    and weights, so it is measured on the model at hand, unless the difference is below `least`.

    Args:
        model: in transformers, and its `logits` for `input_ids`.
        difference: the largest, relative to the largest logit.

    Raises:
        NotChecked: rounding alone moves the logits so far that the difference tells nothing.
    """
    if difference <= least:
        return LogitsMatch(difference, least, None)
    floor = rounding_floor(model, input_ids, logits)
    if MOST < difference <= MARGIN * floor:
        raise NotChecked(
            f"logits differ by {difference:.0e} of the largest, which proves nothing: rounding "
            f"alone moves this model's by {floor:.0e}"
        )
    return LogitsMatch(difference, max(least, min(MARGIN * floor, MOST)), floor)


def rounding_floor(model: Any, input_ids: np.ndarray, logits: np.ndarray) -> float:
    """Measure how much rounding changes a model's logits, relative to the largest.

    The reference is the same model computed in the next wider dtype. Its weights are widened one
    module at a time, so it takes no second copy of them.
    """
    narrow = model.dtype
    wide = torch.float64 if narrow == torch.float32 else torch.float32
    hooks = []
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            hooks.append(module.register_forward_pre_hook(partial(_to, wide)))
            hooks.append(module.register_forward_hook(partial(_to, narrow)))
    try:
        reference = logits_of(model, input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return float(np.abs(logits - reference).max() / np.abs(reference).max())


def _to(dtype: torch.dtype, module: torch.nn.Module, *_: Any) -> None:
    module.to(dtype)
