"""The average of several checkpoints or exports of one model, as a Hugging Face folder.

Weights are read one name at a time from every input, summed in float64, and written like those of
any export, with a certificate. Host memory holds one tensor of each input. bf16 weights are
averaged from their fp32 master copies where a checkpoint has them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from torchprime.checkpoint.export import ExportResult
from torchprime.checkpoint.from_checkpoint import (
    CHECKPOINTS,
    FullWeights,
    copy_small_files,
    export_full,
    fetch_small_files,
    find_checkpoint,
    tensors_of,
    told,
    whole_of,
)
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.export_facts import FACTS, ExportFacts, read_facts
from torchprime.checkpoint.hf.folder import CARD
from torchprime.checkpoint.hf.read import INDEX, SafetensorsReader
from torchprime.checkpoint.hf.served_template import TrainedTemplate
from torchprime.checkpoint.hf.whole import WholeModel
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.proof.certificate import CERTIFICATE, read_certificate
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.errors import CheckpointError
from torchprime.files.atomic import read_regular, write_bytes, write_text
from torchprime.files.foreign_names import inside
from torchprime.files.hashing import hash_file
from torchprime.files.json_files import read_json, token_ids
from torchprime.models.families import is_wrapper
from torchprime.text.markdown_text import inline

MAX_SHARD_BYTES = 5 * 10**9
# Fields of config.json that may differ between inputs.
OWN_FIELDS = ("dtype", "torch_dtype", "transformers_version", "_name_or_path")
# Files that must be the same in all inputs, or absent from all.
SAME_FILES = ("tokenizer.json", "chat_template.jinja")


@dataclass(frozen=True)
class Source:
    """One input of an average.

    Attributes:
        where: its place, for messages.
        files: a folder with its small files.
        tensor_of: gives a weight by its Hugging Face name.
        whole: the model around a text model, if the input is an export of all parts.
    """

    where: str
    facts: ExportFacts
    files: Path
    tensor_of: Callable[[str], Tensor]
    whole: WholeModel | None = None


def last_checkpoints(run: str, count: int) -> list[str]:
    """Return the newest checkpoints of a run's folder, the oldest of them first.

    Raises:
        CheckpointError: it has fewer.
    """
    folder = f"{run.rstrip('/')}/{CHECKPOINTS}"
    steps = Catalog(open_storage(folder)).steps()
    if len(steps) < count:
        raise CheckpointError(
            f"--last: given {count}, but {folder} has {len(steps)} checkpoints. Give a smaller "
            "number; checkpoint.keep_last=null keeps all of a run's checkpoints."
        )
    return [f"{folder}/{Catalog.name_of(step)}" for step in steps[-count:]]


def export_average(
    places: Sequence[str],
    weights: Sequence[float],
    out: Path | str,
    *,
    dtype: torch.dtype | None,
    say: Callable[[str], None],
) -> ExportResult:
    """Write the weighted mean of checkpoints or exports at `out`, whole or not at all, and prove
    it.

    Args:
        weights: one for each place; they add up to 1.
        dtype: of the written weights; None for that of the first input.

    Raises:
        CheckpointError: inputs that do not fit each other, adapters, a used target, a failed check.
    """
    place = ExportPlace.of(out)
    place.require_new()
    with ExitStack() as stack:
        sources = [_open(each, stack, say) for each in places]
        for source in sources[1:]:
            _require_same(sources[0], source)
        first, facts = sources[0], _facts(sources[0], dtype)
        mean = partial(_mean, sources, weights)
        inputs = ", ".join(f"{w:g} x {s.where}" for s, w in zip(sources, weights, strict=True))

        def small_files(folder: Path) -> None:
            copy_small_files(first.files, first.facts, facts, folder)
            average = f"## Average\n\nThe weights are the mean of: {inline(inputs)}.\n"
            write_text(folder / CARD, f"{facts.card_text()}\n{average}")

        origin, compared = f"the mean of {inputs}", "from the mean of the inputs"
        whole = first.whole or whole_of(facts, None)
        full = FullWeights(facts, mean, origin, compared, whole=whole)
        result = export_full(place, small_files, full)
    return told(result, f"averaged {len(sources)} inputs to {place}", place, say)


def _mean(sources: Sequence[Source], weights: Sequence[float], name: str) -> Tensor:
    """Return the weighted mean of one tensor, in float64."""
    total: Tensor | None = None
    for source, weight in zip(sources, weights, strict=True):
        part = source.tensor_of(name).to(torch.float64) * weight
        total = part if total is None else total.add_(part)
    assert total is not None
    return total.to(torch.float32)


def _facts(first: Source, dtype: torch.dtype | None) -> ExportFacts:
    """Return the facts of the average: those of its first input but what only one run has."""
    card = replace(first.facts.card, command=None)
    facts = replace(first.facts, step=None, metrics={}, card=card)
    return facts if dtype is None else replace(facts, dtype=dtype)


# Inputs -------------------------------------------------------------------------------------------


def _open(place: str, stack: ExitStack, say: Callable[[str], None]) -> Source:
    """Open a checkpoint, or the folder of an export with its certificate.

    Raises:
        CheckpointError: it is neither, it is damaged, or it holds an adapter.
    """
    kept = Path(stack.enter_context(TemporaryDirectory()))
    folder = Path(place)
    if "://" not in place and any(folder.glob("*.safetensors")):
        return _open_export(folder, kept)
    storage, name = find_checkpoint(place, say)
    reader = stack.enter_context(CheckpointReader(storage, name))
    fetch_small_files(reader, kept)
    facts = read_facts(kept / FACTS)
    if facts.adapter is not None:
        _refuse_adapter(place)
    fine = replace(facts, dtype=torch.float32)  # master copies where there are any
    return Source(storage.describe(name), facts, kept, tensors_of(reader, fine))


def _open_export(folder: Path, kept: Path) -> Source:
    if (folder / "adapter_config.json").is_file():
        _refuse_adapter(str(folder))
    if not (folder / CERTIFICATE).is_file():
        raise CheckpointError(
            f"{folder} has no {CERTIFICATE}, so it is no export of torchprime. Give checkpoints, "
            "or exports with their certificates."
        )
    certificate, reader = read_certificate(folder), SafetensorsReader(folder)
    for name in certificate.files:
        if not name.endswith(".safetensors") and name != INDEX:
            target = inside(kept, name, str(folder / CERTIFICATE))
            target.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(target, read_regular(folder / name))
    generation = read_json(kept / "generation_config.json")
    config = read_json(kept / "config.json")
    whole = is_wrapper(config)
    template = certificate.check("chat template").values
    trained = TrainedTemplate.from_values(template) if template else None
    facts = ExportFacts(
        spec={name: shape for name, (shape, _) in reader.names().items()},
        dtype=next(dtype for _, dtype in reader.names().values()),
        max_shard_bytes=MAX_SHARD_BYTES,
        stop_ids=tuple(token_ids(generation, "eos_token_id", "generation_config.json")),
        template=trained and trained.sha256,
        tools_template=trained and trained.tools_sha256,
        template_options=dict(trained.options) if trained else {},
        base_model=certificate.base_model,
        parts="all" if whole else "text",
        card=CardFacts(
            name=folder.absolute().name,
            base_model=certificate.base_model,
            wrapper=str(config["model_type"]) if whole else None,
            versions=certificate.versions,
            chat=bool(template),
        ),
    )
    return Source(str(folder), facts, kept, reader.get, WholeModel(folder) if whole else None)


def _refuse_adapter(where: str) -> None:
    raise CheckpointError(
        f"{where} holds an adapter. The mean of several adapters' matrices A and B is not the mean "
        "of their products BA, which are what changes the model. Merge each adapter into the base "
        "(torchprime export --adapter DIR --merge --out MERGED) and average these folders."
    )


def _require_same(one: Source, other: Source) -> None:
    """Raise a CheckpointError unless two inputs have the same weights' names and shapes,
    architecture, tokenizer and template."""
    ours, theirs = one.facts.spec, other.facts.spec
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]
    if names:
        name = names[0]
        _refuse(one, other, f"{len(names)} weights, the first is {name}: "
                f"{_shape(ours.get(name))} and {_shape(theirs.get(name))}")  # fmt: skip
    configs = [read_json(source.files / "config.json") for source in (one, other)]
    keys = [
        key
        for key in sorted({**configs[0], **configs[1]})
        if key not in OWN_FIELDS and configs[0].get(key) != configs[1].get(key)
    ]
    if keys:
        values = " and ".join(repr(config.get(keys[0]))[:60] for config in configs)
        _refuse(one, other, f"{keys[0]} of config.json: {values}")
    for file in SAME_FILES:
        hashes = {_hash(source.files / file) for source in (one, other)}
        if len(hashes) > 1:
            _refuse(one, other, file)
    if one.facts.stop_ids != other.facts.stop_ids:
        _refuse(one, other, f"stop tokens: {one.facts.stop_ids} and {other.facts.stop_ids}")


def _refuse(one: Source, other: Source, what: str) -> None:
    raise CheckpointError(
        f"{one.where} and {other.where} differ in {what}. Only checkpoints of one model with one "
        "tokenizer have a meaningful average."
    )


def _shape(shape: Sequence[int] | None) -> str:
    return "absent" if shape is None else str(list(shape))


def _hash(path: Path) -> str | None:
    return hash_file(path)["sha256"] if path.is_file() else None
