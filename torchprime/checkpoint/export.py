"""The export of trained weights to a Hugging Face folder that transformers and vLLM load unchanged.

Weights come one at a time; each is cast, checked to be finite, hashed and written to its planned
place (safetensors_write). Config, tokenizer, generation settings and model card go beside them
(hf_files), and at last the certificate, after the proofs. All of it is written to a temporary
folder that becomes the export by one rename: whoever sees the folder sees all of it.

`check_export` finds every reason to refuse before the first training step, not after the last.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from torchprime.checkpoint.hf.files import Spec, write_hf_files
from torchprime.checkpoint.hf.portable import check_tokenizer
from torchprime.checkpoint.hf.write import ShardWriter, plan_shards
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.proof.certificate import Certificate
from torchprime.checkpoint.room import Need, require_room

# Receives the folder, complete but for the certificate, and the weights' hashes; writes the
# certificate.
Certify = Callable[[Path, Mapping[str, str]], Certificate]
# Besides the weights' files: config, tokenizer, templates, card, certificate.
SMALL_FILES, SMALL_BYTES = 24, 1_000_000


@dataclass(frozen=True)
class ExportResult:
    """The result of an export. `hashes` are those of the cast weights as they were passed in;
    `folder` is a local path even if the target is a URL."""

    folder: Path
    files: dict[str, int]  # name -> bytes
    hashes: dict[str, str]  # tensor -> sha256, as tensor_hash gives it
    num_parameters: int
    certificate: Certificate | None


def check_export(
    out: Path | ExportPlace,
    *,
    spec: Spec,
    config: Mapping[str, Any],
    dtype: torch.dtype,
    tokenizer_folder: Path,
    eos_token_id: int,
    generation_config: Mapping[str, Any] | None,
    max_shard_bytes: int,
    chat_templates: Mapping[str, str] | None = None,
) -> list[str]:
    """Raise the CheckpointError that `export_hf` would raise, without weights; takes a second.

    Also reads the tokenizer as it would be exported through AutoTokenizer, and compares its ids
    with tokenizer.json's.

    Returns:
        The repairs that the export makes in the source's files, as lines for the user.
    """
    place = ExportPlace.of(out)
    place.require_new()
    plan_shards(spec, dtype, max_shard_bytes)
    require_room([export_need(place, spec, dtype, max_shard_bytes)])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repairs = write_hf_files(
            folder,
            spec=spec,
            config=config,
            dtype=dtype,
            tokenizer_folder=tokenizer_folder,
            eos_token_id=eos_token_id,
            generation_config=generation_config,
            card="",
            chat_templates=chat_templates,
        )
        check_tokenizer(folder)
    return repairs


def export_hf(
    out: Path | str | ExportPlace,
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
    chat_templates: Mapping[str, str] | None = None,
    certify: Certify | None = None,
) -> ExportResult:
    """Write a Hugging Face folder at `out`, whole or not at all, from a run's own files.

    `write_hf_files` and `write_export` say what the arguments are.

    Raises:
        CheckpointError: used target, contradicting or incomplete input, weights not finite.
    """
    small_files = partial(
        write_hf_files,
        spec=spec,
        config=config,
        dtype=dtype,
        tokenizer_folder=Path(tokenizer_folder),
        eos_token_id=eos_token_id,
        generation_config=generation_config,
        card=card,
        chat_templates=chat_templates,
    )
    return write_export(
        out,
        small_files=small_files,
        weights=weights,
        spec=spec,
        dtype=dtype,
        max_shard_bytes=max_shard_bytes,
        certify=certify,
    )


def write_export(
    out: Path | str | ExportPlace,
    *,
    small_files: Callable[[Path], object],
    weights: Iterable[tuple[str, torch.Tensor]],
    spec: Spec,
    dtype: torch.dtype,
    max_shard_bytes: int,
    certify: Certify | None = None,
) -> ExportResult:
    """Write a Hugging Face folder at `out`, whole or not at all.

    Args:
        out: a folder or URL; must be new or empty.
        small_files: writes all but the weights into the folder it is given.
        weights: (HF name, tensor) in any order, each once; taken one at a time and not kept.
        spec: name -> shape of every weight, in the order wanted in the files. Tied: no lm_head.
        dtype: of the exported weights.
        max_shard_bytes: the limit above which files are split.
        certify: called last, before the folder is in its place. A certificate with a failed check
            is written, too: it is for the caller to refuse it, with the weights still there.

    Raises:
        CheckpointError: used target, incomplete input, weights not finite, a target that refuses.
    """
    place = ExportPlace.of(out)
    place.require_new()
    require_room([export_need(place, spec, dtype, max_shard_bytes)])
    with place.folder() as folder:
        small_files(folder)
        hashes = write_weights(folder, weights, spec, dtype, max_shard_bytes)
        certificate = certify(folder, hashes) if certify else None
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    return ExportResult(place.local, sizes, hashes, _count(spec), certificate)


def write_weights(
    folder: Path,
    weights: Iterable[tuple[str, torch.Tensor]],
    spec: Spec,
    dtype: torch.dtype,
    max_shard_bytes: int,
) -> dict[str, str]:
    """Write the safetensors files into a folder and return the tensors' hashes by name."""
    with ShardWriter(folder, spec, dtype, max_shard_bytes) as writer:
        source = iter(weights)
        while writer.write_next(source):
            pass
        writer.finish()
    return writer.hashes


def _count(spec: Spec) -> int:
    return sum(int(np.prod(shape, dtype=np.int64)) for shape in spec.values())


def export_need(place: ExportPlace, spec: Spec, dtype: torch.dtype, max_shard_bytes: int) -> Need:
    """Return the disk space that an export needs, so that a lack of it is found before training."""
    weights = _count(spec) * dtype.itemsize
    shards = weights // max_shard_bytes + 1
    return Need(
        "the export",
        place.disk,
        weights + SMALL_BYTES,
        shards + SMALL_FILES,
        "task.export_checkpoint_path (--out)",
    )
