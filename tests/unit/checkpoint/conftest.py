"""Tiny checkpoints (tiny_families.py), their exports, and checkpoints of runs."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
from saved_checkpoints import saver
from tiny_families import (
    FAMILIES,
    TinyCheckpoint,
    make_checkpoint,
    open_checkpoint,
    write_tokenizer,
)

from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.run.manifest import STEP, Manifest
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.shards import TensorShards, write_shards
from torchprime.checkpoint.run.storage import MANIFEST, FolderWriter, Storage

STOP, END = 0, 1  # ids of <|end|> and <|other|>


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def stories(shared_dir: Path) -> TinyCheckpoint:
    """A genuinely pretrained Llama with a real tokenizer."""
    return open_checkpoint(shared_dir / "models" / "stories260K")


@pytest.fixture(scope="session", params=list(FAMILIES))
def any_family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory):
    return make_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama_untied")


@pytest.fixture(scope="session")
def tied_llama(tmp_path_factory: pytest.TempPathFactory) -> TinyCheckpoint:
    return make_checkpoint(tmp_path_factory.mktemp("tied_llama"), "llama_tied")


@pytest.fixture
def make_hf_folder(tokenizer_folder: Path) -> Callable[..., HfFolder]:
    """Return the folder of a tiny checkpoint's export, with changes to its fields or its
    layout's."""

    def make(checkpoint: TinyCheckpoint, **changes: Any) -> HfFolder:
        fields: dict[str, Any] = dict(
            spec=checkpoint.spec,
            dtype=torch.float32,
            max_shard_bytes=10**9,
            config=checkpoint.config,
            generation_config=None,
            tokenizer_folder=tokenizer_folder,
            eos_token_id=STOP,
        )
        fields |= changes
        layout = WeightLayout(*(fields.pop(name) for name in ("spec", "dtype", "max_shard_bytes")))
        return HfFolder(layout=layout, **fields)

    return make


@pytest.fixture
def export(make_hf_folder: Callable[..., HfFolder]):
    """Call export_hf with everything but the target and the checkpoint filled in."""
    from torchprime.checkpoint.export import export_hf

    def run(out: Path, checkpoint: TinyCheckpoint, *, weights=None, certify=None, **changes: Any):
        folder = make_hf_folder(checkpoint, **changes)
        weights = checkpoint.reader.weights(checkpoint.spec) if weights is None else weights
        return export_hf(out, folder, card="# card\n", weights=weights, certify=certify)

    return run


# A real object store can be named besides: TORCHPRIME_TEST_STORE=gs://bucket/folder
STORE = os.environ.get("TORCHPRIME_TEST_STORE")


@pytest.fixture(params=["local", "memory:/", *([STORE] if STORE else [])])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    """The same tests on a folder and on other file systems, each in a place of its own."""
    if request.param == "local":
        yield open_storage(tmp_path / "checkpoints")
        return
    url = f"{request.param}/{uuid.uuid4().hex}"
    yield open_storage(f"{url}/checkpoints")
    fs, path = fsspec.core.url_to_fs(url)
    fs.invalidate_cache()
    if fs.exists(path):
        fs.rm(path, recursive=True)


def make_manifest(**changes: Any) -> Manifest:
    fields: dict[str, Any] = dict(
        backend="torch_native",
        mesh={"data": 1, "fsdp": 2},
        processes=1,
        config={"seed": 1},
        versions={"torch": torch.__version__},
        created="2026-11-21T12:00:00+00:00",
        model={"names": 2, "dtype": "float32", "parameters": 34, "hash": "a" * 64},
        optimizer={"name": "adamw", "slots": ["exp_avg", "exp_avg_sq"]},
        scheduler={
            "name": "cosine",
            "peak": 1e-4,
            "warmup_steps": 2,
            "total_steps": 10,
            "min_lr_ratio": 0.1,
        },
        global_step=3,
        rng={"torch": "AAAA"},
        tokenizer_fingerprint="b" * 64,
        template_fingerprint=None,
        data_manifest={"train": "c" * 64},
        eval_manifest=None,
        best_metric={"scores": {"eval_loss": 2.5, "right": 0.75}, "step": 2},
    )
    step = changes.get("global_step", fields["global_step"])
    position = {"seed": 1, "next_step": step, "global_batch_size": 8, "num_blocks": 100}
    return Manifest(**{"data_position": position, **fields, **changes})


def cut(name: str, tensor: torch.Tensor, parts: Sequence[int]) -> list[TensorShards]:
    """The tensor cut along each dim into so many parts, as numbered owners hold them."""
    regions = [((), ())]
    for size, count in zip(tensor.shape, parts, strict=True):
        width = -(-size // count)
        steps = [
            (min(i * width, size), min((i + 1) * width, size) - min(i * width, size))
            for i in range(count)
        ]
        regions = [((*o, start), (*s, n)) for o, s in regions for start, n in steps]

    def values(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> list[torch.Tensor]:
        return [tensor[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))]]

    return [
        TensorShards(
            name, tuple(tensor.shape), tensor.dtype, [(o, n)], lambda o=o, n=n: values(o, n)
        )
        for o, n in regions
    ]


def write_checkpoint(
    storage: Storage, name: str, tensors: dict[str, torch.Tensor], **changes: Any
) -> None:
    """A checkpoint as one process writes it, uncut."""
    with storage.create(name) as writer:
        shards = [
            shard
            for key, tensor in tensors.items()
            for shard in cut(key, tensor, (1,) * tensor.dim())
        ]
        write_shards(writer, shards)
        finish(writer, **changes)


def finish(writer: FolderWriter, **changes: Any) -> None:
    """Write the manifest, of the step that the folder is named by."""
    if (named := STEP.fullmatch(writer._name)) is not None:
        changes = {"global_step": int(named[1]), **changes}
    writer.write_bytes(MANIFEST, make_manifest(files=dict(writer.files), **changes).to_bytes())


@pytest.fixture(scope="session")
def run_checkpoint() -> SimpleNamespace:
    """The functions above, for tests: a conftest is not for importing."""
    return SimpleNamespace(manifest=make_manifest, cut=cut, write=write_checkpoint, finish=finish)


@pytest.fixture
def save(run_checkpoint, tokenizer_folder) -> Callable[..., None]:
    """Write a run's checkpoint, each tensor in two parts."""
    return saver(run_checkpoint, tokenizer_folder)
