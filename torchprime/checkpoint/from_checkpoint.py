"""The export of a run's checkpoint to a Hugging Face folder, without the run, its rows or a device.

A checkpoint holds the small files of an export and its facts (hf/export_facts.py). They are copied,
and the weights are read from the shards one at a time. The result is byte for byte the export
that the run itself would have made of these weights, and needs host memory for one tensor only.
Only the certificate differs: there is no trainer to compute logits, so our decoder computes them
on the CPU if the model fits into host memory.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from torchprime.checkpoint.adapter.certificate import certify_adapter
from torchprime.checkpoint.adapter.folder import AdapterFolder
from torchprime.checkpoint.adapter.logits import checkpoint_logits
from torchprime.checkpoint.export import ExportResult, write_export, write_weights
from torchprime.checkpoint.hf.export_facts import FACTS, ExportFacts, read_facts
from torchprime.checkpoint.hf.folder import CARD, HfFolder
from torchprime.checkpoint.hf.portable_config import both_dtype_spellings
from torchprime.checkpoint.hf.read import INDEX, SafetensorsReader
from torchprime.checkpoint.hf.whole import Parts, WholeModel
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.proof.certificate import (
    CERTIFICATE,
    Certificate,
    certify,
    hash_folder,
    read_certificate,
)
from torchprime.checkpoint.proof.logits import (
    PromptLogits,
    decoder_logits,
    no_room,
    prompt_ids,
)
from torchprime.checkpoint.run.catalog import BEST, LATEST, Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.checkpoint.run.storage import MANIFEST, Storage
from torchprime.errors import CheckpointError
from torchprime.files.atomic import write_bytes, write_json, write_text
from torchprime.files.foreign_names import inside
from torchprime.files.json_files import read_json
from torchprime.models.architecture import architecture_from_hf

HF = "hf"  # the export's folder in a checkpoint
CHECKPOINTS = "checkpoints"  # the checkpoints' folder in a run's folder
EMA = "optimizer.ema"  # before the names of the weights' moving average
CONTINUED = "training continued after this checkpoint"  # so its weights are not compared


def find_checkpoint(place: str, say: Callable[[str], None]) -> tuple[Storage, str]:
    """Return the checkpoint that a path or URL names, after verifying all its files.

    Args:
        place: a checkpoint's folder; `latest` or `best` beside it; or a folder of checkpoints or a
            run's folder, which mean the newest whole one.

    Returns:
        The storage and the checkpoint's name in it.

    Raises:
        CheckpointError: there is none there, or it is damaged.
    """
    place = place.rstrip("/")
    parent, _, name = (place if "://" in place else str(Path(place).absolute())).rpartition("/")
    storage = open_storage(parent)
    catalog = Catalog(storage)
    if name in (LATEST, BEST) and storage.exists(name):
        name = _pointed(catalog, name)
    if storage.exists(f"{name}/{MANIFEST}"):
        catalog.check(name)
        return storage, name
    for folder in (place, f"{place}/{CHECKPOINTS}"):
        storage = open_storage(folder)
        if (newest := Catalog(storage).newest_whole(say)) is not None:
            say(f"the newest whole checkpoint in {folder} is {newest}")
            return storage, newest
    raise CheckpointError(
        f"There is no whole checkpoint at {place}: it holds no {MANIFEST}, and neither do folders "
        f"step_NNNNNNNN in it or in {place}/{CHECKPOINTS}. Give a checkpoint's folder "
        f"(RUN/{CHECKPOINTS}/step_00000600), RUN/{CHECKPOINTS}/{LATEST} or a run's folder."
    )


def _pointed(catalog: Catalog, pointer: str) -> str:
    if (name := catalog.pointed(pointer)) is not None:
        return name
    raise CheckpointError(
        f"{catalog.storage.describe(pointer)} is damaged: it names no checkpoint beside it. Name "
        "the checkpoint itself (step_00000600), or the folder for the newest whole one."
    )


class Choice(NamedTuple):
    """The weights of a checkpoint that are exported, and their form.

    Attributes:
        dtype: of the exported weights; None for the one that was trained in. For float32 the
            master weights are taken, if there are any.
        average: take the weights' moving average if the checkpoint has one.
        parts: of a wrapper; None for those that the run was asked for.
    """

    dtype: torch.dtype | None = None
    average: bool = True
    parts: Parts | None = None


AS_TRAINED = Choice()


def export_checkpoint(
    storage: Storage,
    name: str,
    out: Path | str | ExportPlace,
    *,
    choice: Choice = AS_TRAINED,
    base: Path | None = None,
    say: Callable[[str], None],
) -> ExportResult:
    """Export the checkpoint `name` to `out`, whole or not at all, and prove it.

    Args:
        out: a folder or URL.
        base: the folder of the base's weights; None looks where they lay during the run.

    Raises:
        CheckpointError: used target, a checkpoint without what an export needs, a failed check; in
            the latter case the folder is there, with the failed certificate.
    """
    place = ExportPlace.of(out)
    place.require_new()
    place.probe()
    with CheckpointReader(storage, name) as reader, tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary)
        fetch_small_files(reader, kept)
        written = read_facts(kept / FACTS)
        if written.adapter is not None:
            _refuse_choice(choice)
            result = _export_adapter(reader, kept, place, written, base)
            return told(result, f"exported {name} to {place}", place, say)
        dtype, average, parts = choice
        facts = replace(written, dtype=dtype or written.dtype, parts=parts or written.parts)
        whole = whole_of(facts, base)
        tensor_of = tensors_of(reader, facts, average)
        averaged = average and has_average(reader)
        name = f"the moving average in {name}" if averaged else name
        origin = f"{name} of {facts.source}"
        full = FullWeights(facts, tensor_of, origin, "from the checkpoint", base, whole)
        result = export_full(place, partial(copy_small_files, kept, written, facts), full)
    return told(result, f"exported {name} to {place}", place, say)


@dataclass(frozen=True)
class FullWeights:
    """All weights of a model, and what its certificate says of them.

    Attributes:
        tensor_of: returns a weight by its HF name.
        origin: where they are from, in words.
        compared: from where the logits of the certificate's comparison come, in words.
        base: the folder of the base's weights; None looks where they lay during the run.
        whole: the model around the text model, if all of it is exported.
    """

    facts: ExportFacts
    tensor_of: Callable[[str], Tensor]
    origin: str
    compared: str
    base: Path | None = None
    whole: WholeModel | None = None


def export_full(
    place: ExportPlace, small_files: Callable[[Path], None], full: FullWeights
) -> ExportResult:
    """Write an export of all weights, whole or not at all, with its certificate.

    Args:
        small_files: writes all other files into a folder.
    """
    facts = full.facts
    return write_export(
        place,
        small_files=small_files,
        weights=((name, full.tensor_of(name)) for name in facts.spec),
        layout=facts.layout,
        certify=lambda folder, hashes: certify(
            folder,
            hashes,
            facts=facts,
            origin=full.origin,
            trained=decoder_logits_of(folder, facts, full.tensor_of, full.compared),
            base=base_of(facts, full.base),
            whole=full.whole,
        ),
        whole=full.whole,
    )


def told(
    result: ExportResult, what: str, place: ExportPlace, say: Callable[[str], None]
) -> ExportResult:
    """Say what was written and proved; raise the CheckpointError of a failed certificate."""
    assert result.certificate is not None
    result.certificate.require(place)
    for note in result.notes:
        say(f"note: {note}")
    proofs = (result.certificate.check(part).detail for part in ("weights", "logits"))
    say(f"{what}: {'; '.join(proofs)}; certificate: {result.certificate.tally()}")
    return result


def _export_adapter(
    reader: CheckpointReader,
    kept: Path,
    place: ExportPlace,
    facts: ExportFacts,
    base: Path | None,
) -> ExportResult:
    """Export the adapter of a checkpoint as a PEFT folder.

    Args:
        kept: the small files of the checkpoint's hf/.
        base: as for `export_checkpoint`.
    """
    assert facts.adapter is not None
    config = read_json(kept / "config.json")
    hf = HfFolder(facts.layout, config, None, kept, facts.stop_ids[0])
    adapter = AdapterFolder.of(hf, facts)
    names = adapter.parts.shapes
    trained = {name: reader.get(f"model.{name}") for name in names}

    def small_files(folder: Path) -> None:
        copy_small_files(kept, facts, facts, folder)
        adapter.replace_files(folder, facts)

    return write_export(
        place,
        small_files=small_files,
        weights=adapter.renamed(trained.items()),
        layout=adapter.layout,
        certify=partial(
            certify_adapter,
            adapter=adapter,
            facts=facts,
            origin=f"{reader.name} of {facts.source}",
            trained=_adapted_logits(kept, facts, trained, base),
            base=base_of(facts, base),
        ),
    )


def _refuse_choice(choice: Choice) -> None:
    for option, given in (("--dtype", choice.dtype), ("--parts", choice.parts)):
        if given is not None:
            raise CheckpointError(
                f"{option}: given for the checkpoint of an adapter, which is exported as it was "
                "trained. Leave it out; give it when the adapter is merged (--adapter DIR --merge)."
            )


def send_export(folder: Path, out: str, say: Callable[[str], None]) -> None:
    """Copy an export that is whole to another place, every file as its certificate has it.

    Raises:
        CheckpointError: a file is not what the certificate says, a used target, a failed check.
    """
    certificate = read_certificate(folder)
    found, wanted = hash_folder(folder), certificate.files
    if other := sorted(name for name in {**found, **wanted} if found.get(name) != wanted.get(name)):
        raise CheckpointError(
            f"{folder} is not the export that its certificate describes ({', '.join(other)}); "
            f"`torchprime verify {folder}` says more."
        )
    place = ExportPlace.of(out)
    with place.folder() as copy:
        shutil.copytree(folder, copy, dirs_exist_ok=True)
    say(f"copied {folder} to {place}: certificate: {certificate.tally()}")
    certificate.require(place)


def add_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> Certificate:
    """Make of a checkpoint's hf/ a folder that loads: give it weights and a certificate.

    Checks that would delay training (the base, logits in transformers) are left to `verify`.

    Args:
        folder: holds what `Exporter.write_small_files` wrote.
        weights: (HF name, tensor), each once; taken one at a time and not kept.
    """
    facts = read_facts(folder / FACTS)
    hashes = write_weights(folder, weights, facts.layout)
    return certify(
        folder,
        hashes,
        facts=facts,
        origin=f"a checkpoint of {facts.source}",
        trained=CONTINUED,
        base=f"{CONTINUED}; `torchprime verify DIR --base FOLDER` compares them",
    )


# Content of the checkpoint ------------------------------------------------------------------------


def fetch_small_files(reader: CheckpointReader, folder: Path) -> None:
    """Copy hf/ to a local folder, without weights and certificate (checkpoint.hf=true)."""
    prefix = f"{HF}/"
    names = [name.removeprefix(prefix) for name in reader.manifest.files if name.startswith(prefix)]
    if FACTS not in names:
        raise CheckpointError(
            f"{reader.storage.describe(reader.name)} has no {prefix}{FACTS}, which an export needs."
        )
    for name in names:
        if name.endswith(".safetensors") or name in (INDEX, CERTIFICATE):
            continue
        path = inside(folder, name, reader.storage.describe(f"{reader.name}/{MANIFEST}"))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, reader.storage.read_bytes(f"{reader.name}/{prefix}{name}"))


def copy_small_files(kept: Path, written: ExportFacts, facts: ExportFacts, folder: Path) -> None:
    """Copy the small files unchanged, except the fields that name the dtype."""
    for path in sorted(kept.rglob("*")):
        name = path.relative_to(kept).as_posix()
        if path.is_file() and name != FACTS:
            target = inside(folder, name, str(kept))
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, path.read_bytes())
    if facts.dtype != written.dtype:
        config = read_json(kept / "config.json") | both_dtype_spellings(facts.dtype)
        write_json(folder / "config.json", config)
    # The card in a checkpoint is that of the text model.
    if facts.dtype != written.dtype or facts.parts == "all":
        write_text(folder / CARD, facts.card_text())


def _prefixes(reader: CheckpointReader, facts: ExportFacts, average: bool) -> Mapping[str, str]:
    """Return, for each weight, which of its tensors is exported: the moving average if requested,
    `model`, or `master` if that is more precise and was requested."""
    there = set(reader.tensor_names())

    def prefix(name: str) -> str:
        if average and f"{EMA}.{name}" in there:
            return EMA
        coarse = f"model.{name}" in there and reader.dtype(f"model.{name}") != torch.float32
        wanted = facts.dtype == torch.float32 and coarse and f"master.{name}" in there
        return "master" if wanted else "model"

    return {name: prefix(name) for name in facts.spec}


def has_average(reader: CheckpointReader) -> bool:
    """Return True if the checkpoint has a moving average of the weights (task.ema_decay)."""
    return any(name.startswith(f"{EMA}.") for name in reader.tensor_names())


def tensors_of(
    reader: CheckpointReader, facts: ExportFacts, average: bool = True
) -> Callable[[str], Tensor]:
    """Return the source of a checkpoint's weights by name: their moving average if there is one and
    `average`; else the weights, in fp32 if the facts say so and the checkpoint has it."""
    return partial(_tensor, reader, _prefixes(reader, facts, average))


def _tensor(reader: CheckpointReader, prefixes: Mapping[str, str], name: str) -> Tensor:
    return reader.get(f"{prefixes[name]}.{name}")


# Inputs of the checks -----------------------------------------------------------------------------


def decoder_logits_of(
    folder: Path, facts: ExportFacts, tensor_of: Callable[[str], Tensor], origin: str
) -> PromptLogits | str:
    """Return the logits that our decoder computes from tensors, or the reason why it can't.

    Args:
        origin: where the tensors come from, for people.
    """
    config = read_json(folder / "config.json")
    architecture = architecture_from_hf(config)
    if reason := no_room(facts.layout.num_parameters, facts.dtype):
        return reason
    ids = prompt_ids(folder, architecture)
    logits = decoder_logits(config, tensor_of, facts.dtype, ids)
    return PromptLogits(ids, logits, f"torchprime's decoder on the CPU, {origin}")


def _adapted_logits(
    kept: Path, facts: ExportFacts, trained: Mapping[str, Tensor], given: Path | None
) -> PromptLogits | str:
    """Return the logits that our decoder computes from the base and a checkpoint's adapter, or the
    reason why it can't."""
    base = base_of(facts, given)
    if not isinstance(base, Path):
        return base or "training began from random weights"
    found = SafetensorsReader(base)
    found.share_head()
    config = read_json(kept / "config.json")
    return checkpoint_logits(facts, config, found.get, trained, kept)


def whole_of(facts: ExportFacts, given: Path | None) -> WholeModel | None:
    """Return the model around the text model, if all parts are exported. See `base_of`.

    Raises:
        CheckpointError: the base is not here.
    """
    if facts.parts == "text":
        return None
    base = base_of(facts, given)
    if isinstance(base, Path):
        return WholeModel(base)
    raise CheckpointError(
        "All parts of the base are to be exported (export.parts=all, --parts all), and are copied "
        f"from it, but {base or 'training began from random weights'}. Expected --base FOLDER, or "
        "--parts text for the text model alone."
    )


def base_of(facts: ExportFacts, given: Path | None) -> Path | str | None:
    """Return the base's folder, the reason why there is none, or None if training began from random
    weights."""
    if given is not None:
        return given
    if facts.base_model is None:
        return None
    missing = f"the weights of {facts.base_model} are not here; --base FOLDER compares with them"
    if facts.base_folder is None or not Path(facts.base_folder).is_dir():
        return missing
    try:
        SafetensorsReader(facts.base_folder).names()
    except CheckpointError:  # the folder now holds another model
        return missing
    return Path(facts.base_folder)
