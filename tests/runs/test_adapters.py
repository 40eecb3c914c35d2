"""Whole runs that train an adapter: both exports, their proofs, a start from one, mistakes."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import peft
import pytest
import torch
from load_script import load_script
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

RATE = "task.optimizer.learning_rate=0.03"
LORA = ("adapter=lora", "adapter.rank=4", "adapter.dropout=0.1", RATE)


@pytest.fixture(scope="module")
def trained(command, run, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder; the base is as it was."""
    out, before = tmp_path_factory.mktemp("adapter"), sha256(tiny)
    argv = command(*LORA, "export.adapter=both", f"output_dir={out}", "run_name=a")
    assert run([*argv, "checkpoint.every_steps=2", "logging_steps=1"]) == 0
    assert sha256(tiny) == before
    return out / "a"


def sha256(folder: Path) -> str:
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_peft_and_the_merged_model_compute_the_same(trained: Path, tiny: Path) -> None:
    merged = AutoModelForCausalLM.from_pretrained(trained / "export")
    base = AutoModelForCausalLM.from_pretrained(tiny)
    ids = torch.arange(40)[None]
    plain = base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, str(trained / "export" / "adapter"))
    torch.testing.assert_close(adapted(ids).logits, merged(ids).logits, rtol=1e-4, atol=1e-5)
    assert (merged(ids).logits - plain).abs().max() > 0.01


def test_the_adapters_parameters_are_counted(trained: Path) -> None:
    file = trained / "export" / "adapter" / "adapter_model.safetensors"
    with safe_open(file, "pt") as tensors:
        count = sum(math.prod(tensors.get_slice(n).get_shape()) for n in tensors.keys())  # noqa: SIM118
    plan = json.loads((trained / "run.json").read_text())["plan"]
    assert plan["trained_parameters"] == count
    manifest = json.loads((trained / "checkpoints" / "step_00000004" / "manifest.json").read_text())
    assert manifest["model"]["base"] and manifest["config"]["adapter"]["rank"] == 4


def test_training_starts_from_a_peft_folder(
    command, run, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = f"adapter.pretrained={trained / 'export' / 'adapter'}"
    argv = command("adapter.dropout=0.1", start, RATE, "task.max_steps=1")
    assert run([*argv, f"output_dir={tmp_path}", "run_name=b"]) == 0
    assert "starting from the adapter" in capsys.readouterr().err
    first = json.loads((tmp_path / "b" / "metrics.jsonl").read_text().splitlines()[0])
    before = json.loads((trained / "metrics.jsonl").read_text().splitlines()[0])
    assert first["batch_hash"] == before["batch_hash"] and first["loss"] < before["loss"] - 0.01


def test_the_parity_matrix_compares_trained_tensors(
    trained: Path, repo_dir: Path, tmp_path: Path
) -> None:
    """Those of a checkpoint with those that the witness saves in PEFT's form."""
    script = load_script(repo_dir / "experimental" / "parity_matrix" / "weights.py")
    witness = tmp_path / script.WITNESS_FOLDER
    shutil.copytree(trained / "export" / "adapter", witness)
    assert script.largest_difference(tmp_path, trained, 4) == 0
    tensors = load_file(witness / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    tensors[name] *= 1.01
    save_file(tensors, witness / "adapter_model.safetensors")
    assert script.largest_difference(tmp_path, trained, 4) == pytest.approx(0.01, rel=1e-3)
    del tensors[name]
    save_file(tensors, witness / "adapter_model.safetensors")
    with pytest.raises(KeyError, match="lora_B"):
        script.largest_difference(tmp_path, trained, 4)
