"""`torchprime export` and `torchprime verify`: what they take, what they say, how they exit."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from torchprime.checkpoint.export import export_hf
from torchprime.checkpoint.hf.export_facts import FACTS, ExportFacts
from torchprime.checkpoint.hf.folder import HfFolder
from torchprime.checkpoint.proof.certificate import certify
from torchprime.checkpoint.proof.logits import PromptLogits, encode_prompts
from torchprime.checkpoint.run.manifest import Manifest
from torchprime.checkpoint.run.open_storage import open_storage
from torchprime.checkpoint.run.shards import TensorShards, write_shards
from torchprime.checkpoint.run.storage import MANIFEST
from torchprime.cli.main import main
from torchprime.data.tokenizer.load import Tokenizer
from torchprime.files.atomic import write_json

STOP = 1
Say = Callable[..., tuple[int, str]]


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USE_TORCH_XLA", "1")  # put back on leaving, whatever main makes of it


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Run a command; its exit code and all it printed."""

    def run(*argv: object) -> tuple[int, str]:
        capsys.readouterr()
        code = main([str(each) for each in argv])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return code, captured.out + captured.err

    return run


@pytest.fixture(scope="module")
def base(byte_level: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = json.loads((byte_level.folder / "config.json").read_text())
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(folder)
    shutil.copy(byte_level.folder / "tokenizer.json", folder)
    return folder


@pytest.fixture(scope="module")
def tuned(base: Path) -> dict[str, torch.Tensor]:
    return {n: tensor + 0.01 for n, tensor in load_file(base / "model.safetensors").items()}


@pytest.fixture(scope="module")
def facts(base: Path, tuned: dict[str, torch.Tensor]) -> ExportFacts:
    return ExportFacts(
        spec={name: tuple(tensor.shape) for name, tensor in tuned.items()},
        dtype=torch.float32,
        max_shard_bytes=10**9,
        stop_ids=(STOP,),
        base_model="my/base",
        base_folder=str(base),
        step=9,
        fingerprints={"data": "0123456789abcdef"},
    )


def hf_folder(base: Path, byte_level: Tokenizer, facts: ExportFacts) -> HfFolder:
    return HfFolder(
        layout=facts.layout,
        config=json.loads((base / "config.json").read_text()),
        generation_config=None,
        tokenizer_folder=byte_level.folder,
        eos_token_id=STOP,
    )


@pytest.fixture
def exported(made: Path, tmp_path: Path) -> Path:
    """A certified export, for a test to spoil."""
    return Path(shutil.copytree(made, tmp_path / "exported"))


@pytest.fixture(scope="module")
def made(base: Path, tuned, facts: ExportFacts, byte_level: Tokenizer, tmp_path_factory) -> Path:
    model = LlamaForCausalLM.from_pretrained(base, attn_implementation="eager")
    model.load_state_dict(tuned)
    ids = encode_prompts(byte_level.folder / "tokenizer.json")
    with torch.no_grad():
        logits = model(torch.as_tensor(ids)).logits.numpy()
    return export_hf(
        tmp_path_factory.mktemp("made") / "exported",
        hf_folder(base, byte_level, facts),
        card=facts.card_text(),
        weights=tuned.items(),
        certify=partial(
            certify,
            facts=facts,
            origin="a run of a test",
            trained=PromptLogits(ids, logits, "a test"),
            base=base,
        ),
    ).folder


@pytest.fixture
def checkpoints(
    base: Path, tuned: dict[str, torch.Tensor], facts: ExportFacts, byte_level: Tokenizer, tmp_path
) -> Path:
    """A run's folder with one checkpoint."""
    storage = open_storage(tmp_path / "run" / "checkpoints")

    def shards(name: str, tensor: torch.Tensor) -> TensorShards:
        whole = [((0,) * tensor.dim(), tuple(tensor.shape))]
        return TensorShards(name, whole[0][1], tensor.dtype, whole, lambda: [tensor])

    with storage.create("step_00000009") as writer:
        write_shards(writer, [shards(f"model.{name}", tensor) for name, tensor in tuned.items()])
        with writer.local_folder("hf") as folder:
            hf_folder(base, byte_level, facts).write_small_files(folder, facts.card_text())
            write_json(folder / FACTS, facts.to_dict())
        manifest = Manifest(
            backend="test",
            mesh={},
            processes=1,
            config={},
            versions={},
            created="",
            model={"names": 0, "dtype": "float32", "parameters": 0, "hash": ""},
            optimizer={"name": "adamw", "slots": []},
            scheduler={
                "name": "linear",
                "peak": 0,
                "warmup_steps": 0,
                "warmup_ratio": None,
                "total_steps": 0,
                "min_lr_ratio": 0,
            },
            global_step=9,
            rng={},
            data_position={"seed": 0, "next_step": 9, "global_batch_size": 1, "num_blocks": 0},
            tokenizer_fingerprint=None,
            template_fingerprint=None,
            data_manifest={"fingerprint": None},
            eval_manifest=None,
            best_metric=None,
            files=dict(writer.files),
        )
        writer.write_bytes(MANIFEST, manifest.to_bytes())
    return tmp_path / "run"


# verify -------------------------------------------------------------------------------------------


def test_verify_says_what_passes_and_what_cannot_be_checked(say: Say, exported: Path) -> None:
    code, said = say("verify", exported)
    assert code == 0, said
    lines = said.splitlines()
    assert lines[0] == f"{exported}: a run of a test"
    assert lines[-1].startswith("VERIFIED: 7 checks passed, 4 not made (base, chat template, ")
    verdicts = {line[12:26].strip(): line[2:10].strip() for line in lines[1:-1]}
    assert verdicts["files"] == verdicts["weights"] == verdicts["logits"] == "passed"
    assert verdicts["base"] == verdicts["metrics"] == "not made"
    assert "--base FOLDER (it is my/base)" in said and "data 0123456789ab" in said


def test_verify_compares_with_the_base(say: Say, exported: Path, base: Path) -> None:
    code, said = say("verify", exported, "--base", base)
    assert code == 0 and "VERIFIED: 8 checks passed, 3 not made" in said
    assert "tensors differ from the base, the largest change is 0.01 in" in said


def test_verify_of_a_damaged_export_is_1(say: Say, exported: Path) -> None:
    path = exported / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)
    code, said = say("verify", exported)
    assert code == 1
    assert "  FAILED    files" in said and "model.safetensors differs (its sha256)" in said
    assert "FAILED: " in said.splitlines()[-1] and "(files, weights" in said.splitlines()[-1]


def test_verify_with_another_base_is_1(say: Say, exported: Path, base: Path, tmp_path) -> None:
    other = Path(shutil.copytree(base, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    save_file({n: t * 2 for n, t in tensors.items()}, other / "model.safetensors")
    code, said = say("verify", exported, "--base", other)
    assert code == 1 and "Is that folder the base of this export (my/base)?" in said


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["verify", "nowhere"], "nowhere is not a folder"),
        (["verify", "."], "There is no certificate.json in ."),
        (["verify", "exported", "--base", "./nowhere"], "There is no local folder ./nowhere"),
        (["verify"], "required: DIR"),
        (["verify", "exported", "--bsae", "x"], "unrecognized arguments"),
    ],
)
def test_verify_of_what_cannot_be_verified_is_2(
    say: Say, exported: Path, monkeypatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(exported.parent)
    code, said = say(*argv)
    assert code == 2 and message in said


# export -------------------------------------------------------------------------------------------


def test_export_of_a_run_is_of_its_newest_checkpoint(
    say: Say, checkpoints: Path, exported: Path, tmp_path
) -> None:
    out = tmp_path / "out"
    code, said = say("export", checkpoints, "--out", out)
    assert code == 0, said
    assert "the newest whole checkpoint in" in said and "is step_00000009" in said
    assert f"exported step_00000009 to {out}: " in said
    for path in exported.iterdir():
        if path.name != "certificate.json":
            assert (out / path.name).read_bytes() == path.read_bytes(), path.name
    assert say("verify", out)[0] == 0


def test_export_in_another_dtype_and_with_a_base(
    say: Say, checkpoints: Path, tuned, base: Path, tmp_path
) -> None:
    place = checkpoints / "checkpoints" / "step_00000009"
    code, _ = say("export", place, "--out", tmp_path / "out", "--dtype", "bf16", "--base", base)
    assert code == 0
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], tuned[name].bfloat16()) for name in tuned)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    code, said = say("verify", tmp_path / "out", "--base", base)
    assert code == 0, said


def test_export_whose_certificate_fails_is_2(
    say: Say, checkpoints: Path, base: Path, tuned, tmp_path
) -> None:
    untrained = tmp_path / "same"
    shutil.copytree(base, untrained)
    save_file(tuned, untrained / "model.safetensors", metadata={"format": "pt"})
    out = tmp_path / "out"
    code, said = say("export", checkpoints, "--out", out, "--base", untrained)
    assert code == 2
    assert "its certificate failed:\n  base: none of" in said and (out / "config.json").is_file()
    assert say("verify", out)[0] == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["run", "--out", "exported"], "already holds"),
        (["nowhere", "--out", "out"], "There is no whole checkpoint at nowhere"),
        (
            ["exported", "--out", "out", "--dtype", "fp32"],
            "--dtype, --base, --raw, --parts: given with exported",
        ),
        (["run"], "required: --out"),
        (["run", "--out", "out", "--parts", "all"], "expected one with a text model inside"),
        (["run", "--out", "out", "--dtype", "fp8"], "invalid choice: 'fp8'"),
        (["run", "--out", "out", "--base", "./nowhere"], "There is no local folder ./nowhere"),
        (["nope://x/step_00000001", "--out", "out"], "CHECKPOINT: given 'nope://x/step_00000001'"),
        (["run", "--out", "gz://b/x"], "Did you mean gs://?"),
        (["run", "--out", "exported/config.json/out"], "config.json is not a folder"),
    ],
)
def test_export_of_what_cannot_be_exported_is_2(
    say: Say, checkpoints: Path, exported: Path, monkeypatch, argv: list[str], message: str
) -> None:
    monkeypatch.chdir(exported.parent)
    code, said = say("export", *argv)
    assert code == 2 and message in said
    assert not (exported.parent / "out").exists()


def test_an_export_to_a_url_is_the_folders(
    say: Say, checkpoints: Path, base: Path, tmp_path: Path, monkeypatch
) -> None:
    url, out = f"memory://exports/{tmp_path.name}/out", tmp_path / "out"
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    assert say("export", checkpoints, "--out", out, "--base", base)[0] == 0
    code, said = say("export", checkpoints, "--out", url, "--base", base)
    assert code == 0 and f"exported step_00000009 to {url}: " in said
    storage = open_storage(url)
    for path in (p for p in out.rglob("*") if p.is_file()):
        assert storage.read_bytes(path.relative_to(out).as_posix()) == path.read_bytes()
    assert storage.names() == sorted(path.name for path in out.iterdir())
    assert not list((tmp_path / "temporary").iterdir())
    code, said = say("export", checkpoints, "--out", url)
    assert code == 2 and f"{url} already holds" in said
    for command in (["verify", url], ["chat", "--model", url], ["report", url]):
        code, said = say(*command)
        assert code == 2 and f"given '{url}', expected a path on this machine" in said


def test_an_export_is_copied_as_its_certificate_has_it(
    say: Say, exported: Path, tmp_path: Path
) -> None:
    url = f"memory://exports/{tmp_path.name}/copy"
    code, said = say("export", exported, "--out", url)
    assert code == 0 and f"copied {exported} to {url}" in said
    for path in (p for p in exported.rglob("*") if p.is_file()):
        name = path.relative_to(exported).as_posix()
        assert open_storage(url).read_bytes(name) == path.read_bytes()
    with (exported / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"!")
    code, said = say("export", exported, "--out", tmp_path / "spoilt")
    assert code == 2 and "(model.safetensors)" in said and not (tmp_path / "spoilt").exists()


@pytest.fixture
def adapter(base: Path, tmp_path: Path) -> Path:
    """A PEFT folder of the base."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": str(base),
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["o_proj"],
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = "base_model.model.model.layers.0.self_attn.o_proj"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{module}.lora_A.weight": torch.randn(2, 16, generator=generator),
        f"{module}.lora_B.weight": torch.randn(16, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def test_an_adapter_is_merged(say: Say, adapter: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "merged"
    code, said = say("export", "--adapter", adapter, "--merge", "--out", out)
    assert code == 0 and f"merged {adapter} into {base}: {out}: " in said
    lora = load_file(adapter / "adapter_model.safetensors")
    b, a = (lora[name] for name in sorted(lora, reverse=True))
    before, after = (load_file(each / "model.safetensors") for each in (base, out))
    name = "model.layers.0.self_attn.o_proj.weight"
    torch.testing.assert_close(after.pop(name), before.pop(name) + 2 * b @ a)
    assert all(torch.equal(before[other], tensor) for other, tensor in after.items())
    code, said = say("verify", out, "--base", base)
    assert code == 0 and "VERIFIED" in said
    code, said = say(
        *("export", "--adapter", adapter, "--merge", "--base", base),
        *("--dtype", "bf16", "--out", tmp_path / "narrow"),
    )
    assert code == 0
    narrow = load_file(tmp_path / "narrow" / "model.safetensors")
    assert {tensor.dtype for tensor in narrow.values()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "CHECKPOINT: not given; expected CHECKPOINT --out DIR, or --adapter"),
        (["--merge"], "CHECKPOINT: not given"),
        (["RUN", "--merge"], "--merge: given without --adapter"),
        (["RUN", "--base-dtype", "nf4"], "--base-dtype: given without --adapter"),
        (["--adapter", "A"], "--adapter: given without --merge"),
        (["RUN", "--adapter", "A", "--merge"], "--adapter: given with CHECKPOINT RUN"),
        (["--adapter", "./none", "--merge"], "There is no local folder ./none"),
        (["--adapter", "BASE", "--merge"], "is no PEFT folder: it has no adapter_config.json"),
        (["--adapter", "ADAPTER", "--merge", "--base", "ADAPTER"], "There is a PEFT adapter"),
        (["--adapter", "ADAPTER", "--merge", "--parts", "all"], "expected one with a text model"),
    ],
)
def test_arguments_that_do_not_go_together(
    arguments: list[str], message: str, say: Say, adapter: Path, base: Path, tmp_path: Path
) -> None:
    real = {"ADAPTER": str(adapter), "BASE": str(base)}
    given = [real.get(each, each) for each in arguments]
    code, said = say("export", *given, "--out", tmp_path / "out")
    assert code == 2 and message in said and not (tmp_path / "out").exists()
    assert said.count("error:") == 1


@pytest.mark.parametrize(
    ("file", "changes", "message"),
    [
        ("adapter", {"peft_type": "LOHA"}, "peft_type: given 'LOHA', expected 'LORA'"),
        ("adapter", {"use_qalora": True}, "use_qalora: given True"),
        ("adapter", {"target_modules": ["c_attn"]}, "is no adapter for this model"),
        ("adapter", {"base_model_name_or_path": None}, "--base: not given, and"),
        ("base", {"quantization_config": {"quant_method": "awq"}}, "holds quantized weights"),
        ("base", {"num_hidden_layers": 2}, "missing: model.layers.1.self_attn.o_proj"),
        ("base", {"hidden_size": 32}, "o_proj.lora_B.weight is [16, 2], in the model [32, 2]"),
    ],
)
def test_what_cannot_be_merged_is_refused_in_one_message(
    file: str, changes: dict, message: str, say: Say, adapter: Path, base: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "base"))
    path = adapter / "adapter_config.json" if file == "adapter" else copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    chosen = [] if "base_model_name_or_path" in changes else ["--base", copy]
    code, said = say("export", "--adapter", adapter, "--merge", *chosen, "--out", tmp_path / "out")
    assert code == 2 and message in said and not (tmp_path / "out").exists()
    assert said.count("error:") == 1


def test_help_says_the_exit_codes(say: Say) -> None:
    for command in ("export", "verify"):
        code, said = say(command, "--help")
        assert code == 0 and "Exit code: 0" in said


def test_interrupted_is_130(say: Say, exported: Path, monkeypatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("torchprime.cli.verify.recheck_any", interrupt)
    assert say("verify", exported) == (130, "interrupted\n")
