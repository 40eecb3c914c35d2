"""The export of trained weights to a Hugging Face folder that transformers and vLLM load unchanged.

Weights come one at a time; each is cast, checked to be finite, hashed and written to its planned
place (hf/write.py). Config, tokenizer, generation settings and model card go beside them
(hf/folder.py), and at last the certificate, after the proofs. All of it is written to a temporary
folder that becomes the export by one rename: whoever sees the folder sees all of it.

`check_export` finds every reason to refuse before the first training step, not after the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.whole import WholeModel
from torchprime.checkpoint.hf.write import ShardWriter, WeightLayout
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
    `folder` is a local path even if the target is a URL. `notes` are lines for the user: the
    differences of a whole model's small files from its base's."""

    folder: Path
    files: dict[str, int]  # name -> bytes
    hashes: dict[str, str]  # tensor -> sha256, as tensor_hash gives it
    num_parameters: int
    certificate: Certificate | None
    notes: tuple[str, ...] = ()


class Exported(Protocol):
    """A folder to be written, of a whole model or of an adapter."""

    @property
    def layout(self) -> WeightLayout:
        """The weights, and how they are stored."""
        ...

    def check(self) -> list[str]:
        """Find contradictions without weights; return the repairs of the source's files."""
        ...


def check_export(out: Path | ExportPlace, folder: Exported) -> list[str]:
    """Raise the CheckpointError that writing the folder would raise, without weights; takes a
    second.

    Returns:
        The repairs that the export makes in the source's files, as lines for the user.
    """
    place = ExportPlace.of(out)
    place.require_new()
    require_room([export_need(place, folder.layout)])
    return folder.check()


def export_hf(
    out: Path | str | ExportPlace,
    hf_folder: HfFolder,
    *,
    card: str,
    weights: Iterable[tuple[str, torch.Tensor]],
    certify: Certify | None = None,
    whole: WholeModel | None = None,
) -> ExportResult:
    """Write a Hugging Face folder at `out`, whole or not at all, from a run's own files.

    Args:
        card: the text of README.md.

    `write_export` describes the other arguments.

    Raises:
        CheckpointError: used target, contradicting or incomplete input, weights not finite.
    """
    return write_export(
        out,
        small_files=partial(hf_folder.write_small_files, card=card),
        weights=weights,
        layout=hf_folder.layout,
        certify=certify,
        whole=whole,
    )


def write_export(
    out: Path | str | ExportPlace,
    *,
    small_files: Callable[[Path], object],
    weights: Iterable[tuple[str, torch.Tensor]],
    layout: WeightLayout,
    certify: Certify | None = None,
    whole: WholeModel | None = None,
) -> ExportResult:
    """Write a Hugging Face folder at `out`, whole or not at all.

    Args:
        out: a folder or URL; must be new or empty.
        small_files: writes all but the weights into the folder it is given.
        weights: (HF name, tensor) in any order, each once; taken one at a time and not kept.
        layout: the weights that have to come, and their split into files.
        certify: called last, before the folder is in its place. A certificate with a failed check
            is written, too: it is for the caller to refuse it, with the weights still there.
        whole: the model around the text model that the other arguments describe; it is written
            then, and `certify` gets the text model's hashes.

    Raises:
        CheckpointError: used target, incomplete input, weights not finite, a target that refuses.
    """
    place = ExportPlace.of(out)
    place.require_new()
    written = layout if whole is None else whole.layout(layout)
    notes: list[str] = []
    require_room([export_need(place, written)])
    with place.folder() as folder:
        small_files(folder)
        if whole is None:
            hashes = write_weights(folder, weights, layout)
        else:
            notes = whole.replace_files(folder, written)
            hashes = write_weights(folder, whole.weights(weights, written), written)
            hashes = whole.text_hashes(hashes)
        certificate = certify(folder, hashes) if certify else None
        sizes = {
            str(path.relative_to(folder)): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
    count = written.num_parameters
    return ExportResult(place.local, sizes, hashes, count, certificate, tuple(notes))


def write_weights(
    folder: Path, weights: Iterable[tuple[str, torch.Tensor]], layout: WeightLayout
) -> dict[str, str]:
    """Write the safetensors files into a folder and return the tensors' hashes by name."""
    with ShardWriter(folder, layout) as writer:
        source = iter(weights)
        while writer.write_next(source):
            pass
        writer.finish()
    return writer.hashes


def export_need(place: ExportPlace, layout: WeightLayout) -> Need:
    """Return the disk space that an export needs, so that a lack of it is found before training."""
    shards = layout.num_bytes // layout.max_shard_bytes + 1
    return Need(
        "the export",
        place.disk,
        layout.num_bytes + SMALL_BYTES,
        shards + SMALL_FILES,
        "task.export_checkpoint_path (--out)",
    )
