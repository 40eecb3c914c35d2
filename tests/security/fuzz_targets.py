"""The readers that `fuzz.py` feeds: each takes the bytes of a file and calls the product's reader.

Seeds are small valid files, made here. A new target needs a name, `read` (bytes and an empty
folder), seeds and the form of the file, by which it is changed.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import safetensors.torch
import tokenizers
import torch
import zstandard
from resigned import write_manifest
from tokenizers import decoders, models, pre_tokenizers
from torch.distributed.checkpoint import filesystem, metadata

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.proof.certificate import read_certificate, trained_options
from torchprime.checkpoint.run.dcp_metadata import parse_metadata
from torchprime.checkpoint.run.manifest import Manifest
from torchprime.compare.logs.read import read_run
from torchprime.data.files.source import SourceSpec
from torchprime.data.rows.read import open_rows
from torchprime.data.rows.row import PLAIN_READING
from torchprime.data.templates.choose import resolve_template
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.files.json_files import read_json, token_ids
from torchprime.models.architecture import architecture_from_hf

# Kinds of mutations: any bytes, a JSON document, JSON on each line, or a header as safetensors.
BYTES, JSON, LINES, HEADER = "bytes", "json", "lines", "header"
PACKERS = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.ZstdCompressor().compress,
}


@dataclass(frozen=True)
class Target:
    """One kind of file.

    Attributes:
        read: reads the bytes as a file in an empty folder; any exception but a UserError is a
            finding.
        seeds: valid files.
        words: what the fuzzer may insert, between spaces.
    """

    read: Callable[[bytes, Path], object]
    seeds: Callable[[], list[bytes]]
    form: str = BYTES
    words: str = ""


# Rows ---------------------------------------------------------------------------------------------

ROWS: list[dict[str, Any]] = [
    {"prompt": "a", "completion": "b", "weight": 0.5},
    {"instruction": "a", "input": "c", "output": "b"},
    {"text": "a b"},
    {
        "messages": [
            {"role": "user", "content": "a"},
            {
                "role": "assistant",
                "content": "b",
                "tool_calls": [{"function": {"name": "f", "arguments": '{"x": 1}'}}],
            },
            {"role": "tool", "content": "c"},
            {"role": "assistant", "content": "d", "weight": 0},
        ],
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
        ],
    },
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {
        "message_tree_id": "1",
        "prompt": {
            "text": "a",
            "role": "prompter",
            "replies": [{"text": "b", "role": "assistant", "rank": 0, "replies": []}],
        },
    },
    {"message_tree_id": "1", "message_id": "1", "parent_id": None, "text": "a", "role": "prompter"},
    {"question": "a", "answer": "b"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": None},
]


def rows_of(ending: str) -> Callable[[bytes, Path], object]:
    def read(data: bytes, folder: Path) -> None:
        path = folder / f"rows{ending}"
        path.write_bytes(data)
        _, rows = open_rows(SourceSpec(str(path)), PLAIN_READING)
        for _ in rows:
            pass

    return read


def packed_rows(data: bytes, folder: Path) -> None:
    """The first byte chooses the compression."""
    endings = list(PACKERS)
    rows_of(f".jsonl{endings[data[0] % len(endings)] if data else '.gz'}")(data[1:], folder)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def packed() -> list[bytes]:
    return [bytes([i]) + pack(lines(ROWS[:1] * 2)) for i, pack in enumerate(PACKERS.values())]


def tables() -> list[pyarrow.Table]:
    typed = {
        "prompt": pyarrow.array(["a", "b"]).dictionary_encode(),
        "completion": pyarrow.array(["c", None]),
        "time": pyarrow.array([1, 2], pyarrow.timestamp("ns", "UTC")),
        "map": pyarrow.array([[("k", 1)], []], pyarrow.map_(pyarrow.string(), pyarrow.int64())),
    }
    return [pyarrow.Table.from_pylist([row]) for row in ROWS] + [pyarrow.table(typed)]


def parquet() -> list[bytes]:
    files = []
    for table in tables():
        sink = io.BytesIO()
        pyarrow.parquet.write_table(table, sink, compression="none")
        files.append(sink.getvalue())
    return files


def arrow() -> list[bytes]:
    files = []
    for table in tables():
        for new in (pyarrow.ipc.new_stream, pyarrow.ipc.new_file):
            sink = io.BytesIO()
            with new(sink, table.schema) as writer:
                writer.write_table(table)
            files.append(sink.getvalue())
    return files


# Models and tokenizers ----------------------------------------------------------------------------

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "eos_token_id": [1, 2],
}
QWEN = {
    **LLAMA,
    "model_type": "qwen3",
    "use_sliding_window": True,
    "sliding_window": 4,
    "layer_types": ["full_attention", "sliding_attention"],
    "rope_scaling": {"type": "linear", "factor": 2.0},
}
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 1e4,
}
TEMPLATE = (
    "{% for message in messages %}{{ '<s>' + message['role'] + message.content }}"
    "{% generation %}{{ message.content | trim }}{% endgeneration %}</s>{% endfor %}"
)
JINJA = (
    "{% {%- %} {{ }} {# for if elif else endif set macro call filter namespace loop recursive "
    "raise_exception strftime_now tojson default messages tools add_generation_prompt"
)


def as_json(*contents: object) -> Callable[[], list[bytes]]:
    return lambda: [json.dumps(content).encode() for content in contents]


def config(data: bytes, folder: Path) -> None:
    (folder / "config.json").write_bytes(data)
    content = read_json(folder / "config.json")
    architecture_from_hf(content)
    token_ids(content, "eos_token_id", "config.json")


def _tokenizer_json() -> str:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", "<pad>", *alphabet])}
    raw = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    raw.add_special_tokens(["<s>", "</s>", "<pad>"])
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return raw.to_str()


TOKENIZER = _tokenizer_json()
SETTINGS = {"eos_token": "</s>", "bos_token": {"content": "<s>"}, "add_bos_token": True}


def tokenizer_settings(data: bytes, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(TOKENIZER)
    (folder / "tokenizer_config.json").write_bytes(data)
    resolve_template(None, load_tokenizer(folder))


def template_file(data: bytes, folder: Path) -> None:
    (folder / "chat_template.jinja").write_bytes(data)
    tokenizer_settings(json.dumps(SETTINGS).encode(), folder)


# Weights ------------------------------------------------------------------------------------------

TENSORS = {"model.a": torch.ones(2, 3), "lm_head.weight": torch.ones(4, dtype=torch.bfloat16)}
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = {"metadata": {}, "weight_map": {"model.a": FIRST, "lm_head.weight": SECOND}}


def weights(data: bytes, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(data)
    reader = SafetensorsReader(folder)
    for _, tensor in reader.weights(reader.names()):
        tensor.clone()


def index(data: bytes, folder: Path) -> None:
    for file, name in zip((FIRST, SECOND), TENSORS, strict=True):
        (folder / file).write_bytes(safetensors.torch.save({name: TENSORS[name]}))
    (folder / "model.safetensors.index.json").write_bytes(data)
    SafetensorsReader(folder).names()


# Checkpoints --------------------------------------------------------------------------------------


def dcp_metadata() -> list[bytes]:
    size, offset = torch.Size([4, 3]), torch.Size([0, 0])
    entry = metadata.TensorStorageMetadata(
        metadata.TensorProperties(dtype=torch.float32),
        size,
        [metadata.ChunkStorageMetadata(offsets=offset, sizes=size)],
    )
    place = filesystem._StorageInfo("__0_0.distcp", 0, 1000)
    whole = metadata.Metadata({"a": entry}, None, {metadata.MetadataIndex("a", offset): place})
    return [pickle.dumps(whole, protocol) for protocol in (2, 4)]


MANIFEST = {
    "format_version": 1,
    "sha256": "",
    "backend": "native",
    "mesh": {"data": 1},
    "processes": 1,
    "config": {"seed": 1},
    "versions": {"torch": "2.9"},
    "created": "2026-01-01",
    "model": {"names": 1, "dtype": "float32", "parameters": 12, "hash": None},
    "optimizer": {"name": "adamw", "slots": ["exp_avg"]},
    "scheduler": {
        "name": "cosine",
        "peak": 1e-3,
        "warmup_steps": 0,
        "total_steps": 4,
        "min_lr_ratio": 0,
    },
    "global_step": 2,
    "rng": {"torch": "AA=="},
    "data_position": {"seed": 1, "next_step": 2, "global_batch_size": 2, "num_blocks": 8},
    "tokenizer_fingerprint": None,
    "template_fingerprint": None,
    "data_manifest": {},
    "eval_manifest": None,
    "best_metric": {"scores": {"loss": 1.0}, "step": 2},
    "hooks": {},
    "metrics": {},
    "scores": {},
    "files": {"a": {"bytes": 3, "sha256": "d" * 64}},
}


def manifest(data: bytes, folder: Path) -> None:
    """Its own hash is made to fit where it can be, as somebody who knows how would."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError):
        content = None
    if isinstance(content, dict):
        try:
            write_manifest(folder / "manifest.json", content)
            data = (folder / "manifest.json").read_bytes()
        except (ValueError, RecursionError):
            pass  # it cannot be written again
    Manifest.from_bytes(data, "manifest.json")


CERTIFICATE = {
    "format_version": 1,
    "passed": True,
    "origin": "a",
    "base_model": None,
    "step": 2,
    "dtype": "float32",
    "fingerprints": {"data": "x"},
    "metrics": {"loss": 1.0},
    "versions": {"torch": "2.9"},
    "checks": [
        {"name": "chat template", "passed": True, "detail": "", "values": {"options": {}}},
        {"name": "logits", "passed": None, "detail": "not made", "values": {}},
    ],
    "files": {"config.json": {"bytes": 3, "sha256": "d" * 64}},
}


def certificate(data: bytes, folder: Path) -> None:
    (folder / "certificate.json").write_bytes(data)
    trained_options(folder)
    found = read_certificate(folder)
    json.dumps(found.to_dict())
    found.tally()
    found.require(folder)


# Logs ---------------------------------------------------------------------------------------------

OURS = [
    {"kind": "train", "step": 1, "loss": 2.5, "grad_norm": 1.0, "lr": 0.1, "supervised_tokens": 8},
    {"kind": "train", "step": 2, "loss": None, "nonfinite": {"loss": "nan"}, "batch_hash": "a"},
    {"kind": "eval", "step": 2, "eval_loss": 2.25, "source_losses": {"a": 1.0}},
]
FACTORY = [
    {"current_steps": 5, "total_steps": 10, "loss": 2.5, "lr": 0.1},
    {"current_steps": 10, "total_steps": 10, "eval_loss": 2.25},
]
STATE = {
    "max_steps": 4,
    "log_history": [
        {"step": 2, "loss": 2.5, "grad_norm": 1.0, "learning_rate": 0.1, "epoch": 1.0},
        {"step": 4, "loss": 2.25, "grad_norm": 1.0, "learning_rate": 0.1},
        {"step": 4, "eval_loss": 2.0},
        {
            "step": 4,
            "train_loss": 2.375,
            "train_runtime": 2.0,
            "train_steps_per_second": 2.0,
        },
    ],
}
TEXTS = (
    "{'loss': 2.5, 'grad_norm': 1.0, 'learning_rate': 1e-05, 'epoch': 0.5}\r\n"
    " 50%|#####     | 1/2 [00:01<00:01,  1.0s/it]\r"
    "{'loss': '2.25', 'step': 2}\n{'eval_loss': 2.0}\n"
    "{'train_runtime': 2.0, 'train_steps_per_second': 1.0}\n",
    "[default0]: step: 1 loss: 2.5000 grad_norm: 1.0 lr: 1e-05\nstep: 2 loss: 2.2500\n",
    "completed step: 0, seconds: 0.1, TFLOP/s: 1, loss: 2.5\n"
    "eval metrics after step: 0, loss=2.0\n",
    " iteration 1/ 10 | lm loss: 2.5E+00 | grad norm: 1.0 | learning rate: 1.0E-05 |\n",
    "Epoch 1 | iter 1 step 1 | loss train: 2.500, val: n/a\n1|5|Loss: 2.5\n",
)
LOG_WORDS = "step loss nan inf 1e400 -1 1,000 epoch eval_loss { } ' [ ] : |"


def run_beside(name: str) -> Callable[[bytes, Path], object]:
    """The file as one of a run's folder, beside a good metrics.jsonl."""

    def read(data: bytes, folder: Path) -> None:
        (folder / "metrics.jsonl").write_bytes(lines(OURS))
        (folder / name).write_bytes(data)
        found = read_run("a", folder if name != "train.log" else folder / name)
        assert found.steps and (found.dtype or found.covered)

    return read


def trainer_state(data: bytes, folder: Path) -> None:
    (folder / "trainer_state.json").write_bytes(data)
    read_run("a", folder)


TARGETS = {
    "rows.jsonl": Target(rows_of(".jsonl"), lambda: [lines([row]) for row in ROWS], LINES),
    "rows.json": Target(
        rows_of(".json"), as_json(ROWS[:1] * 2, ROWS[3], {"rows": ROWS[3:4]}), JSON
    ),
    "rows.csv": Target(
        rows_of(".csv"),
        lambda: [b'prompt,completion\na,"b\n""c"""\nd,e\n', b"\xef\xbb\xbftext\na\n"],
    ),
    "rows.parquet": Target(rows_of(".parquet"), parquet),
    "rows.arrow": Target(rows_of(".arrow"), arrow),
    "rows.jsonl.gz": Target(packed_rows, packed),
    "config.json": Target(config, as_json(LLAMA, QWEN, {**LLAMA, "rope_parameters": SCALED}), JSON),
    "tokenizer_config.json": Target(
        tokenizer_settings,
        as_json(
            {**SETTINGS, "chat_template": TEMPLATE},
            {**SETTINGS, "chat_template": [{"name": "default", "template": TEMPLATE}]},
        ),
        JSON,
    ),
    "chat_template.jinja": Target(template_file, lambda: [TEMPLATE.encode()], words=JINJA),
    "model.safetensors": Target(weights, lambda: [safetensors.torch.save(TENSORS)], HEADER),
    "model.safetensors.index.json": Target(index, as_json(INDEX), JSON),
    ".metadata": Target(lambda data, _: parse_metadata(data, ".metadata"), dcp_metadata),
    "manifest.json": Target(manifest, as_json(MANIFEST), JSON),
    "certificate.json": Target(certificate, as_json(CERTIFICATE), JSON),
    "metrics.jsonl": Target(
        run_beside("metrics.jsonl"), lambda: [lines(OURS), lines(FACTORY)], LINES
    ),
    "run.json": Target(run_beside("run.json"), as_json({"model": {"dtype": "float32"}}), JSON),
    "config.yaml": Target(
        run_beside("config.yaml"),
        lambda: [b"torch_dtype: float32\nseed: 1\na: &a [1, {b: c}]\nd: *a\n"],
        words="& * - : !! !!python/name:os.system ? | > [ ] { } << 1e999 0o7",
    ),
    "trainer_state.json": Target(trainer_state, as_json(STATE), JSON),
    "train.log": Target(
        run_beside("train.log"), lambda: [text.encode() for text in TEXTS], words=LOG_WORDS
    ),
}
