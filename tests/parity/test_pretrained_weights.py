"""The proof that pretrained weights are really used: a real model, a real task, and a control.

stories260K knows its little world but never saw an answer or a stop token. A short fine-tune on
three quarters of the passages must make it answer unseen ones; the same fine-tune from random
weights must not. The whole path takes part: the command, SPMD on four devices, the export,
transformers' generate.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from torchprime.config.entry import run_main
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.generation.with_transformers import generation_samples
from torchprime.torch_xla_models import train


@pytest.fixture(scope="module")
def rows(shared_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict]]:
    """A file with the training rows, and the held-out rows: no passage is on both sides."""
    lines = (shared_dir / "data" / "tinystories_qa.jsonl").read_text().splitlines()
    sides: dict[bool, list[dict]] = {True: [], False: []}
    for row in map(json.loads, lines):
        passage = row["prompt"].split("\nQuestion:")[0]
        held_out = int(hashlib.sha256(passage.encode()).hexdigest(), 16) % 4 == 0
        sides[held_out].append(row)
    path = tmp_path_factory.mktemp("rows") / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, sides[False])))
    return path, sides[True]


def _exact(folder: Path, tokenizer_folder: Path, rows: list[dict]) -> float:
    """Share of answers that are the expected one and then stop."""
    tokenizer = load_tokenizer(tokenizer_folder)
    prompts = [tokenizer.prompt_ids(row["prompt"]) for row in rows]
    answers = generation_samples(folder, prompts, [tokenizer.eos_id], 12)
    right = [
        bool(ids)
        and ids[-1] == tokenizer.eos_id
        and tokenizer.decode(ids[:-1]).strip() == row["completion"].strip()
        for ids, row in zip(answers, rows, strict=True)
    ]
    return sum(right) / len(right)


def _tune(base: list[str], file: Path, out: Path, name: str) -> Path:
    code = run_main(
        train.main,
        [
            *base,
            "dataset=file",
            f"dataset.file_dataset_path={file}",
            "dataset.block_size=256",
            "ici_mesh.fsdp=2",
            "ici_mesh.tensor=2",
            "task.global_batch_size=4",
            "task.max_steps=84",
            "task.export_checkpoint_path=export",
            "task.optimizer.learning_rate=1e-3",
            "task.optimizer.weight_decay=0.0",
            "task.lr_scheduler.name=cosine",
            "task.lr_scheduler.warmup_steps=5",
            "task.lr_scheduler.warmup_ratio=null",
            "task.lr_scheduler.min_lr_ratio=0.0",
            "logging_steps=42",
            f"output_dir={out}",
            f"run_name={name}",
        ],
    )
    assert code == 0
    return out / name / "export"


@pytest.mark.slow
def test_pretrained_weights_answer_and_random_ones_do_not(
    rows: tuple[Path, list[dict]], shared_dir: Path, tmp_path: Path
) -> None:
    file, held_out = rows
    assert len(held_out) >= 50
    model = shared_dir / "models" / "stories260K"
    assert _exact(model, model, held_out) <= 0.02
    tuned = _tune([f"model.pretrained_model={model}", "task=sft"], file, tmp_path, "tuned")
    assert _exact(tuned, model, held_out) >= 0.65
    architecture = json.loads((model / "config.json").read_text())
    keys = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    keys += ("num_attention_heads", "num_key_value_heads", "tie_word_embeddings", "rms_norm_eps")
    values = [f"++model.architecture.{key}={architecture[key]}" for key in keys]
    scratch = ["model.pretrained_model=null", f"model.tokenizer_name={model}", "task=train"]
    random = _tune([*scratch, *values], file, tmp_path, "random")
    assert _exact(random, model, held_out) <= 0.10
