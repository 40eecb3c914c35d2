"""config.json files of users: from the file to a certified export, or a refusal by name.

Weights are random; the certificate compares our decoder's logits with transformers'.
"""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from torchprime.checkpoint.export import export_hf
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.proof.certificate import certify, read_certificate
from torchprime.checkpoint.proof.logits import PromptLogits, decoder_logits, encode_prompts
from torchprime.errors import CheckpointError
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor
from torchprime.training.run.export import Exporter
from torchprime.training.setup.model_files import ModelFiles, find_model, pretrained_tensors


def config_of(shared: Path, name: str) -> dict[str, Any]:
    return json.loads((shared / "cases" / "models" / f"{name}.config.json").read_text())


def model_folder(config: dict[str, Any], tokenizer: Path, folder: Path) -> Path:
    """A checkpoint of this config with random weights."""
    shutil.copytree(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(config))
    std = model.architecture.initializer_range
    weights = {n: initial_tensor(n, p.shape, std, 3) for n, p in model.named_parameters()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def export(files: ModelFiles, out: Path) -> dict[str, tuple[bool | None, str]]:
    """Check and export a model as a run does after no step; the certificate's checks."""
    exporter = Exporter(
        files,
        layout=WeightLayout(files.shapes, torch.float32, 10**9),
        card=CardFacts(base_model=str(files.folder)),
        template=None,
        stop_ids=[files.tokenizer.eos_id],
        fingerprints={},
        say=lambda line: None,
    )
    exporter.check(out)
    facts = exporter.facts(0, {})
    tensor_of = pretrained_tensors(files, torch.float32)
    ids = encode_prompts(files.tokenizer.folder / "tokenizer.json")
    logits = decoder_logits(files.hf_config, tensor_of, torch.float32, ids)
    result = export_hf(
        out,
        exporter.hf_folder(),
        card=facts.card_text(),
        weights=((name, tensor_of(name)) for name in files.shapes),
        certify=partial(
            certify,
            facts=facts,
            origin="a test",
            trained=PromptLogits(ids, logits, "our decoder"),
            base=None,
        ),
    )
    assert result.certificate is not None
    return {check.name: (check.passed, check.detail) for check in result.certificate.checks}


def found(folder: Path) -> ModelFiles:
    return find_model(
        pretrained_model=str(folder),
        tokenizer_name=None,
        architecture=None,
        cache_dir=None,
        weights=True,
    )


@pytest.mark.parametrize("name", ["kanana", "padlist", "attnnull", "kv1", "rope_llama3_top"])
def test_a_users_config_is_exported_and_certified(
    shared_dir: Path, make_tokenizer_folder, tmp_path: Path, name: str
) -> None:
    """head_dim of its own, lists of ids, nulls, one kv head, a rope whose context is outside."""
    tokenizer = make_tokenizer_folder(tmp_path / "tokenizer")
    folder = model_folder(config_of(shared_dir, name), tokenizer, tmp_path / "model")
    checks = export(found(folder), tmp_path / "out")
    assert not [check for check in checks.items() if check[1][0] is False]
    assert checks["logits"][0] and checks["tokenizer"][0]


def test_a_rope_in_two_spellings_of_which_one_was_edited_is_refused(
    shared_dir: Path, make_tokenizer_folder, tmp_path: Path
) -> None:
    """Left alone, transformers 5 would scale its positions and transformers 4 not."""
    config = config_of(shared_dir, "rope_export_linear")
    folder = make_tokenizer_folder(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"differ in rope_type \(default and linear\)"):
        found(folder)
    one = {key: value for key, value in config.items() if key != "rope_parameters"}
    assert architecture_from_hf(one).ropes[0].kind == "linear"


@pytest.mark.slow
def test_heads_of_a_size_of_their_own_are_trained(
    shared_dir: Path, make_tokenizer_folder, tmp_path: Path, command, run
) -> None:
    """Three heads of 8 in a hidden size of 32, which transformers 5 refuses to load."""
    tokenizer = make_tokenizer_folder(tmp_path / "tokenizer")
    folder = model_folder(config_of(shared_dir, "kanana"), tokenizer, tmp_path / "model")
    place = [f"model.pretrained_model={folder}", f"output_dir={tmp_path}", "run_name=run"]
    mesh = ["ici_mesh.fsdp=4", "ici_mesh.tensor=1"]
    assert run(command(*place, *mesh, "task.max_steps=2")) == 0
    certificate = read_certificate(tmp_path / "run" / "export")
    assert certificate.check("logits").passed and certificate.check("base").passed
