"""Tiny checkpoints made by transformers itself, so that nothing is compared with our own output.

Every family has its switches on: rope scaling, tied and untied embeddings, biases, q/k norms.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
import torch
import transformers
from saved_checkpoints import saver
from tiny_llama import SHAPE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.run.manifest import STEP, Manifest
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.shards import TensorShards, write_shards
from torchprime.checkpoint.run.storage import MANIFEST, FolderWriter, Storage

SIZES = dict(
    **SHAPE,
    vocab_size=320,
    max_position_embeddings=128,
    bos_token_id=None,
    eos_token_id=0,
    pad_token_id=None,
)
LLAMA3_ROPE = dict(
    rope_type="llama3",
    rope_theta=500_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=32,
)
FAMILIES = {
    "llama_tied": ("Llama", dict(rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True)),
    "llama_untied": (
        "Llama",
        dict(rope_parameters=dict(rope_type="linear", rope_theta=3e4, factor=2.0)),
    ),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": (
        "Qwen3",
        dict(head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    ),
    "mistral": ("Mistral", dict(sliding_window=16)),
    "ministral": (
        "Ministral",
        dict(head_dim=16, sliding_window=16, layer_types=["full_attention", "sliding_attention"]),
    ),
    "glm4": ("Glm4", dict(head_dim=16, partial_rotary_factor=0.5)),
    "granite": (
        "Granite",
        dict(
            embedding_multiplier=12.0,
            attention_multiplier=0.0078125,
            residual_multiplier=0.22,
            logits_scaling=16.0,
        ),
    ),
    "smollm3": ("SmolLM3", dict(no_rope_layers=[1, 0])),
    "phi3": (
        "Phi3",
        dict(
            partial_rotary_factor=0.75,
            original_max_position_embeddings=32,
            rope_scaling=dict(
                type="longrope", short_factor=[1.0, 1.1, 1.2], long_factor=[1.0, 2.0, 4.0]
            ),
        ),
    ),
    "gemma3": (
        "Gemma3",
        dict(
            head_dim=16,
            query_pre_attn_scalar=16,
            sliding_window=16,
            layer_types=["sliding_attention", "full_attention"],
            rope_parameters=dict(
                full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                sliding_attention=dict(rope_type="default", rope_theta=1e4),
            ),
        ),
    ),
    "olmo3": (
        "Olmo3",
        dict(sliding_window=16, layer_types=["sliding_attention", "full_attention"]),
    ),
}
STOP, END = 0, 1  # ids of <|end|> and <|other|>


@dataclass(frozen=True)
class TinyCheckpoint:
    folder: Path
    config: dict[str, Any]
    reader: SafetensorsReader
    spec: dict[str, tuple[int, ...]]


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE that keeps numbers whole, unlike Qwen's, which cuts them into digits."""
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        ["Question: Tom has 12 apples and 345. Answer: the end"] * 9, trainer
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "TokenizersBackend",
        "eos_token": "<|end|>",
        "backend": "tokenizers",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def make_checkpoint(folder: Path, family: str, **changes: Any) -> TinyCheckpoint:
    """A random model of a family, saved by transformers."""
    name, switches = FAMILIES[family]
    model_class = getattr(transformers, f"{name}ForCausalLM")
    config = model_class.config_class(**{**SIZES, **switches, **changes})
    torch.manual_seed(7)
    model = model_class(config)
    with torch.no_grad():
        for parameter in model.parameters():  # no ones and zeros: a swapped norm or bias must show
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return open_checkpoint(folder)


def open_checkpoint(folder: Path) -> TinyCheckpoint:
    reader = SafetensorsReader(folder)
    config = json.loads((folder / "config.json").read_text())
    return TinyCheckpoint(folder, config, reader, {n: s for n, (s, _) in reader.names().items()})


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
