"""From trained weights to a Hugging Face folder that transformers and vLLM load unchanged.

Weights come one at a time; each is cast, checked to be finite, hashed and written to its planned
place (safetensors_write). Config, tokenizer, generation settings and model card go beside them
(portable). All of it is written to a temporary folder that becomes the export by one rename:
whoever sees the folder sees all of it. `verify` then reads it back.

`check_export` finds every reason to refuse before the first training step, not after the last.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchprime.atomic import atomic_folder, refuse_used_folder, write_json
from torchprime.checkpoint.portable import (
    check_tokenizer,
    portable_config,
    portable_generation_config,
    write_tokenizer,
)
from torchprime.checkpoint.safetensors_write import ShardWriter, plan_shards
from torchprime.errors import CheckpointError

Spec = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class ExportResult:
    """What was written. `hashes` are of the weights as they were handed over, after the cast."""

    folder: Path
    files: dict[str, int]  # name -> bytes
    hashes: dict[str, str]  # tensor -> sha256, as tensor_hash gives it
    num_parameters: int


def check_export(
    out: Path,
    *,
    spec: Spec,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    tokenizer_folder: Path,
    eos_token_id: int,
    max_shard_bytes: int,
    chat_template: str | None = None,
) -> None:
    """Raise the CheckpointError that `export_hf` would raise, without weights; takes a second.

    Also reads the tokenizer as it would be exported through AutoTokenizer, and compares its ids
    with tokenizer.json's.
    """
    refuse_used_folder(out)
    plan_shards(spec, dtype, max_shard_bytes)
    _require_space(out, spec, dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_json(folder / "config.json", portable_config(config, spec, dtype, eos_token_id))
        write_tokenizer(folder, tokenizer_folder, eos=eos_token_id, chat_template=chat_template)
        check_tokenizer(folder)


def export_hf(
    out: Path,
    *,
    weights: Iterable[tuple[str, torch.Tensor]],
    spec: Spec,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    tokenizer_folder: Path,
    eos_token_id: int,
    generation_config: Mapping[str, Any] | None,
    card: str,
    max_shard_bytes: int,
    chat_template: str | None = None,
) -> ExportResult:
    """Write a Hugging Face folder at `out`, whole or not at all.

    Args:
        out: must not exist, or be an empty folder.
        weights: (HF name, tensor) in any order, each once; taken one at a time and not kept.
        spec: name -> shape of every weight, in the order wanted in the files. Tied: no lm_head.
        config: the source's config.json, parsed.
        dtype: of the exported weights.
        tokenizer_folder: holds tokenizer.json and what goes with it.
        eos_token_id: the stop token that was trained.
        chat_template: the one that was trained with; None keeps the tokenizer's own.
        generation_config: the source's generation_config.json, parsed; None if it has none.
        card: the text of README.md.
        max_shard_bytes: files are split above it.

    Raises:
        CheckpointError: used target, contradicting or incomplete input, weights not finite.
    """
    out = Path(out)
    _require_space(out, spec, dtype)
    final_config = portable_config(config, spec, dtype, eos_token_id)
    generation = portable_generation_config(generation_config, config, eos_token_id)
    with atomic_folder(out) as folder:
        write_json(folder / "config.json", final_config)
        write_json(folder / "generation_config.json", generation)
        write_tokenizer(
            folder, Path(tokenizer_folder), eos=eos_token_id, chat_template=chat_template
        )
        (folder / "README.md").write_text(card, encoding="utf-8")
        with ShardWriter(folder, spec, dtype, max_shard_bytes) as writer:
            source = iter(weights)
            while writer.write_next(source):
                pass
            writer.finish()
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return ExportResult(out, sizes, writer.hashes, _count(spec))


def _count(spec: Spec) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in spec.values())


def _require_space(out: Path, spec: Spec, dtype: torch.dtype) -> None:
    """Better to say it before training than to fill the disk after it."""
    place = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    free, needed = shutil.disk_usage(place).free, _count(spec) * dtype.itemsize
    if needed > free:
        raise CheckpointError(
            f"The export to {out} needs {needed / 1e9:.2f} GB; {free / 1e9:.2f} GB are free there. "
            "Free some space or set task.export_checkpoint_path to another disk."
        )
