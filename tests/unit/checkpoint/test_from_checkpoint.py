"""An export from a checkpoint is the export at the end of the run, to the byte, from wherever the
checkpoint lies and however its tensors are cut."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import saved_checkpoints
import torch
import transformers
from saved_checkpoints import NAME, facts_of, hf_folder, trained

from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.adapter.certificate import base_fingerprint
from torchprime.checkpoint.adapter.export import export_adapter
from torchprime.checkpoint.adapter.folder import AdapterFolder
from torchprime.checkpoint.adapter.parts import adapter_parts
from torchprime.checkpoint.export import export_hf
from torchprime.checkpoint.from_checkpoint import (
    Choice,
    add_weights,
    export_checkpoint,
    find_checkpoint,
)
from torchprime.checkpoint.hf.export_facts import ExportFacts
from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.checkpoint.proof.recheck import recheck
from torchprime.checkpoint.proof.verify import load_transformers
from torchprime.checkpoint.run.catalog import Catalog
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.reader import CheckpointReader
from torchprime.checkpoint.run.storage import Storage
from torchprime.errors import CheckpointError

TEMPLATES = {"zeta": "z{{ messages }}", "default": "d{{ messages }}", "alpha": "a{{ messages }}"}
Files = dict[str, bytes]


@pytest.fixture
def at_the_end(tokenizer_folder) -> Callable[..., Path]:
    """The export that the run itself makes of these weights."""

    def run(out: Path, checkpoint, weights, facts: ExportFacts | None = None) -> Path:
        facts = facts or facts_of(checkpoint)
        return export_hf(
            out,
            hf_folder(checkpoint, facts, tokenizer_folder),
            card=facts.card_text(),
            weights=weights.items(),
        ).folder

    return run


def contents(folder: Path) -> Files:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in paths}


def exported(storage: Storage, out: Path, **choice: Any) -> Files:
    """An export's files without the certificate, which has to verify."""
    export_checkpoint(storage, NAME, out, choice=Choice(**choice), say=lambda line: None)
    failed = [check for check in recheck(out)[1] if check.passed is False]
    assert not failed, failed
    files = contents(out)
    del files["certificate.json"]
    return files


# The same bytes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "tied_llama"])
def test_an_export_from_a_checkpoint_is_the_runs_to_the_byte(
    storage, family, request, save, at_the_end, tmp_path
) -> None:
    """From a folder and from another file system."""
    checkpoint = request.getfixturevalue(family)
    weights = trained(checkpoint)
    save(storage, checkpoint, weights)
    wanted = contents(at_the_end(tmp_path / "end", checkpoint, weights))
    assert len([name for name in wanted if name.endswith(".safetensors")]) > 1
    assert exported(storage, tmp_path / "out") == wanted


@pytest.fixture
def local(tmp_path) -> Storage:
    return open_storage(tmp_path / "run" / "checkpoints")


def test_templates_in_no_order_stay_as_the_run_wrote_them(
    local, llama, save, at_the_end, tmp_path, tokenizer_folder, monkeypatch
) -> None:
    settings = json.loads((tokenizer_folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = [{"name": n, "template": t} for n, t in TEMPLATES.items()]
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    original = hf_folder

    def of_folder(checkpoint, facts, _):
        return original(checkpoint, facts, folder)

    monkeypatch.setitem(globals(), "hf_folder", of_folder)
    monkeypatch.setattr(saved_checkpoints, "hf_folder", of_folder)  # of the fixture `save`
    weights = trained(llama)
    save(local, llama, weights)
    wanted = contents(at_the_end(tmp_path / "end", llama, weights))
    assert "additional_chat_templates/zeta.jinja" in wanted
    assert exported(local, tmp_path / "out") == wanted


def test_another_dtype_changes_weights_config_and_card_alone(
    local, llama, save, at_the_end, tmp_path
) -> None:
    """And is what a run in that dtype would have written of these weights."""
    weights = trained(llama)
    save(local, llama, weights)
    rounded = facts_of(llama, dtype=torch.bfloat16)
    wanted = contents(at_the_end(tmp_path / "end", llama, weights, rounded))
    found = exported(local, tmp_path / "out", dtype=torch.bfloat16)
    assert found == wanted
    assert load_transformers(tmp_path / "out").dtype == torch.bfloat16
    same = exported(local, tmp_path / "same")
    changed = {name for name in same if not name.startswith("model") and same[name] != found[name]}
    assert changed == {"config.json", "README.md"}


def test_float32_comes_from_the_master_weights(local, llama, save, tmp_path) -> None:
    fine = trained(llama)
    coarse = {name: (tensor * 1.1).bfloat16() for name, tensor in fine.items()}  # unlike any fine
    facts = facts_of(llama, dtype=torch.bfloat16)
    more = {f"master.{name}": tensor for name, tensor in fine.items()}
    save(local, llama, coarse, facts=facts, more=more)
    exported(local, tmp_path / "fp32", dtype=torch.float32)
    exported(local, tmp_path / "bf16")
    for folder, weights in (("fp32", fine), ("bf16", coarse)):
        reader = SafetensorsReader(tmp_path / folder)
        assert reader.names().keys() == weights.keys()
        assert all(torch.equal(reader.get(name), weights[name]) for name in weights)


def test_float32_without_master_weights_is_the_model_widened(local, llama, save, tmp_path) -> None:
    coarse = trained(llama, torch.bfloat16)
    save(local, llama, coarse, facts=facts_of(llama, dtype=torch.bfloat16))
    exported(local, tmp_path / "out", dtype=torch.float32)
    reader = SafetensorsReader(tmp_path / "out")
    assert all(torch.equal(reader.get(name), coarse[name].float()) for name in coarse)


def test_one_tensor_in_memory_at_a_time(local, llama, save, tmp_path, monkeypatch) -> None:
    save(local, llama, trained(llama))
    monkeypatch.setattr(
        "torchprime.checkpoint.from_checkpoint.no_room", lambda *_: "not to be in memory"
    )
    alive: list[weakref.ref] = []
    plain = CheckpointReader.get

    def get(self: CheckpointReader, name: str, region: Any = None) -> torch.Tensor:
        assert not [r for r in alive if r() is not None], f"another is held when {name} is read"
        tensor = plain(self, name, region)
        alive.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(CheckpointReader, "get", get)
    export_checkpoint(local, NAME, tmp_path / "out", say=lambda line: None)
    assert len(alive) == len(llama.spec)


# Proof of the export ------------------------------------------------------------------------------


def test_the_certificate_says_where_it_comes_from(local, tied_llama, save, tmp_path) -> None:
    save(local, tied_llama, trained(tied_llama))
    said: list[str] = []
    export_checkpoint(local, NAME, tmp_path / "out", say=said.append)
    certificate = recheck(tmp_path / "out")[0]
    assert certificate.origin == f"{NAME} of a run from some/model after 7 updates"
    assert certificate.metrics == {"train loss of the last step": 1.25}
    logits = certificate.check("logits")
    assert logits.passed and "decoder on the CPU" in logits.values["computed_by"]
    base = certificate.check("base").values
    assert base["changed"] == base["tensors"] == len(tied_llama.spec)
    assert len(said) == 1 and "certificate: 6 checks passed, 1 not made (chat template)" in said[0]
    for text in (str(tmp_path / "out"), "read back equal", "logits of transformers match"):
        assert text in said[0]


def test_logits_are_those_of_the_checkpoints_tensors(
    local, llama, save, tmp_path, monkeypatch
) -> None:
    """Not of the files that were written: those are what is judged."""
    save(local, llama, trained(llama))
    plain = transformers.LlamaForCausalLM.forward

    def forward(self: Any, *args: Any, **more: Any) -> Any:
        output = plain(self, *args, **more)
        assert output.logits is not None
        output.logits[..., 0] += 1.0
        return output

    monkeypatch.setattr(transformers.LlamaForCausalLM, "forward", forward)
    with pytest.raises(CheckpointError, match="(?s)certificate failed.*logits: .*logits differ"):
        export_checkpoint(local, NAME, tmp_path / "out", say=lambda line: None)
    assert (tmp_path / "out" / "certificate.json").is_file()


@pytest.mark.parametrize(
    ("folder", "reason"),
    [(None, "are not here"), ("nowhere", "are not here"), (".", "are not here")],
)
def test_a_base_that_is_elsewhere_by_now_is_not_compared(
    local, llama, save, tmp_path, folder, reason
) -> None:
    base_folder = None if folder is None else str(tmp_path / folder)
    save(local, llama, trained(llama), facts=facts_of(llama, base_folder=base_folder))
    export_checkpoint(local, NAME, tmp_path / "out", say=lambda line: None)
    check = recheck(tmp_path / "out")[0].check("base")
    assert check.passed is None and reason in check.detail and "some/model" in check.detail
    export_checkpoint(local, NAME, tmp_path / "given", base=llama.folder, say=lambda line: None)
    assert recheck(tmp_path / "given")[0].check("base").passed


def test_from_random_weights_there_is_no_base(local, llama, save, tmp_path) -> None:
    save(local, llama, trained(llama), facts=facts_of(llama, base_model=None, base_folder=None))
    exported(local, tmp_path / "out")
    check = recheck(tmp_path / "out")[0].check("base")
    assert check.passed is None and "random weights" in check.detail


def test_a_checkpoint_with_weights_in_hf_is_loadable_and_certified(
    storage, llama, save, at_the_end, tmp_path
) -> None:
    """checkpoint.hf=true; and it exports like one without."""
    weights = trained(llama)
    save(storage, llama, weights, keep=lambda folder: add_weights(folder, weights.items()))
    names = CheckpointReader(storage, NAME).manifest.files
    hf = tmp_path / "hf"
    for name in names:
        if name.startswith("hf/"):
            (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
            (tmp_path / name).write_bytes(storage.read_bytes(f"{NAME}/{name}"))
    model = load_transformers(hf).state_dict()
    assert all(torch.equal(model[name], weights[name]) for name in weights)
    verdicts = {check.name: check.passed for check in recheck(hf, llama.folder)[1]}
    assert verdicts["files"] and verdicts["weights"] and verdicts["base"]
    assert verdicts["logits"] is None and False not in verdicts.values()
    wanted = contents(at_the_end(tmp_path / "end", llama, weights))
    assert exported(storage, tmp_path / "out") == wanted


# Checkpoints that cannot be exported --------------------------------------------------------------


def test_used_targets_are_refused_before_anything_is_read(local, llama, save, tmp_path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    with pytest.raises(CheckpointError, match="already holds"):
        export_checkpoint(local, NAME, out, say=lambda line: None)
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_a_checkpoint_without_what_an_export_needs(local, run_checkpoint, tmp_path) -> None:
    run_checkpoint.write(local, NAME, {"model.w": torch.ones(2)})
    with pytest.raises(CheckpointError, match="has no hf/export.json"):
        export_checkpoint(local, NAME, tmp_path / "out", say=lambda line: None)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def adapter_facts(llama) -> ExportFacts:
    spec = AdapterSpec(
        rank=2, alpha=4.5, targets=("q_proj", "up_proj"), modules_to_train=("*.norm",)
    )
    return facts_of(llama, adapter=spec, base_sha256=base_fingerprint(llama.folder)["sha256"])


def test_an_adapter_from_a_checkpoint_is_the_runs_to_the_byte(
    local, llama, adapter_facts, save, tokenizer_folder, tmp_path
) -> None:
    hf = hf_folder(llama, adapter_facts, tokenizer_folder)
    adapter = AdapterFolder.of(hf, adapter_facts)
    generator = torch.Generator().manual_seed(0)
    shapes = adapter.parts.shapes
    weights = {n: torch.randn(shape, generator=generator) * 0.3 for n, shape in shapes.items()}
    save(local, llama, weights, facts=adapter_facts)
    at_end = export_adapter(
        tmp_path / "end",
        adapter,
        facts=adapter_facts,
        weights=weights.items(),
        origin="a test",
        trained="not here",
        base="not here",
    )
    with pytest.raises(CheckpointError, match="--dtype: given for the checkpoint of an adapter"):
        export_checkpoint(local, NAME, tmp_path / "no", choice=Choice(torch.bfloat16), say=print)
    result = export_checkpoint(local, NAME, tmp_path / "out", say=lambda line: None)
    wanted, found = contents(at_end.folder), contents(result.folder)
    del wanted["certificate.json"], found["certificate.json"]
    assert found == wanted and "adapter_config.json" in found and "config.json" not in found
    assert result.certificate is not None
    passed = {check.name for check in result.certificate.checks if check.passed}
    assert {"weights", "adapter", "trained", "base", "logits", "merged"} <= passed


def test_an_adapter_without_its_base_is_exported(
    local, llama, adapter_facts, save, tmp_path
) -> None:
    facts = dataclasses.replace(adapter_facts, base_folder=str(tmp_path / "gone"))
    shapes = adapter_parts(llama.config, adapter_facts.adapter).shapes
    save(local, llama, {n: torch.ones(shape) for n, shape in shapes.items()}, facts=facts)
    result = export_checkpoint(local, NAME, tmp_path / "out", say=lambda line: None)
    assert result.certificate is not None
    assert result.certificate.check("logits").passed is None
    assert "--base FOLDER" in result.certificate.check("logits").detail


def test_a_missing_weight_is_named(local, llama, save, tmp_path) -> None:
    weights = trained(llama)
    del weights["model.norm.weight"]
    save(local, llama, weights)
    with pytest.raises(CheckpointError, match="no tensor model.model.norm.weight"):
        export_checkpoint(local, NAME, tmp_path / "out", say=lambda line: None)
    assert not list(tmp_path.glob("*out*"))


# Choice of the checkpoint -------------------------------------------------------------------------


@pytest.fixture
def several(local, run_checkpoint) -> Storage:
    for step in (5, 10, 15):
        run_checkpoint.write(local, Catalog.name_of(step), {"model.w": torch.full((2,), step)})
    catalog = Catalog(local)
    catalog.point("latest", "step_00000010")
    catalog.point("best", "step_00000005")
    return local


@pytest.mark.parametrize(
    ("place", "step"),
    [
        ("run/checkpoints/step_00000010", 10),
        ("run/checkpoints/step_00000010/", 10),
        ("run/checkpoints/latest", 10),
        ("run/checkpoints/best", 5),
        ("run/checkpoints", 15),
        ("run", 15),
    ],
)
def test_places_that_mean_a_checkpoint(several, tmp_path, place, step, monkeypatch) -> None:
    given = (str(tmp_path / place), f"file://{tmp_path / place}", place)
    monkeypatch.chdir(tmp_path)
    for each in given:
        storage, name = find_checkpoint(each + ("/" if place.endswith("/") else ""), print)
        assert name == f"step_{step:08d}"
        assert CheckpointReader(storage, name).get("model.w").tolist() == [step, step]


def test_a_url_means_a_checkpoint(storage, run_checkpoint) -> None:
    run_checkpoint.write(storage, "step_00000003", {"model.w": torch.ones(2)})
    for place in ("step_00000003", ""):
        found, name = find_checkpoint(storage.describe(place), print)
        assert name == "step_00000003" and found.exists(f"{name}/manifest.json")


def test_a_damaged_checkpoint_is_refused_and_skipped(several, tmp_path) -> None:
    (shard,) = (tmp_path / "run" / "checkpoints" / "step_00000015").glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{shard.name} is damaged"):
        find_checkpoint(str(shard.parent), print)
    said: list[str] = []
    assert find_checkpoint(str(tmp_path / "run"), said.append)[1] == "step_00000010"
    assert "step_00000015 is skipped" in said[0] and "step_00000010" in said[-1]


@pytest.mark.parametrize("place", ["nowhere", "run/checkpoints/step_00000099", "run/other"])
def test_places_without_a_checkpoint_say_what_to_give(several, tmp_path, place) -> None:
    with pytest.raises(CheckpointError, match="There is no whole checkpoint at .*latest"):
        find_checkpoint(str(tmp_path / place), print)
