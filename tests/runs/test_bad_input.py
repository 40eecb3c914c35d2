"""User errors at the real entry point: exit code 2, one message, nothing written."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch_xla.debug.metrics as xla_metrics
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from torchprime.errors import ConfigError
from torchprime.torch_xla_models.backend import XlaBackend

WEIGHTS = "model.safetensors"
Refused = Callable[..., str]


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Every file's content and every folder below this one."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def compiles() -> int:
    data = xla_metrics.metric_data("CompileTime")
    return 0 if data is None else int(data[0])


def one_error(printed: str) -> str:
    """The message, which is the only one and the last thing printed."""
    starts = [match.start() for match in re.finditer(r"^error: ", printed, re.MULTILINE)]
    assert len(starts) == 1, printed
    return printed[starts[0] + len("error: ") :].strip()


@pytest.fixture
def refused(command, run, tmp_path: Path, monkeypatch, capsys) -> Refused:
    """Run in tmp_path with these overrides; the message, after the checks all mistakes share."""
    monkeypatch.chdir(tmp_path)

    def check(*overrides: str, flags: list[str] | None = None) -> str:
        before, compiled = snapshot(tmp_path), compiles()
        code = run([*(flags or []), *command("run_name=mine", *overrides)])
        out, err = capsys.readouterr()
        assert code == 2
        assert "Traceback" not in out + err
        assert snapshot(tmp_path) == before
        assert compiles() == compiled, "the mistake was found only after a compile"
        return one_error(err)

    return check


@pytest.fixture
def changed_weights(tiny: Path, tmp_path: Path) -> Callable[[Callable], Path]:
    """A copy of the checkpoint after a function has changed its tensors."""

    def make(change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny, folder)
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        return folder

    return make


# Configuration ----------------------------------------------------------------------------------


def test_misspelt_key(refused: Refused) -> None:
    message = refused("task.max_stepz=3")
    assert message == (
        "task.max_stepz: given '3', but there is no such key. Did you mean task.max_steps?"
    )


def test_misspelt_key_in_a_users_own_yaml(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(
        "defaults: [default, _self_]\ntask: {optimizer: {lerning_rate: 1}}"
    )
    message = refused(flags=["--config-dir", str(tmp_path), "--config-name", "mine"])
    assert "task.optimizer.lerning_rate" in message
    assert "task.optimizer.learning_rate" in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("task.max_steps=many", "a whole number, not text"),
        ("logging_steps=2.5", "a whole number, not a float"),
        ("task.optimizer.learning_rate=fast", "a number, not text"),
        ("dry_run=maybe", "true or false, not text"),
        ("dataset.packing=bdf", "one of none, bfd, bfd_split, wrapped"),
        ("ici_mesh.fsdp=null", "a whole number, not null"),
    ],
)
def test_wrong_type(override: str, expected: str, refused: Refused) -> None:
    key, value = override.split("=")
    message = refused(override)
    assert message.startswith(f"{key}: given {value if value == 'null' else ''}")
    assert value in message
    assert f"expected {expected}" in message
    assert f"{key}=" in message  # how to write it


def test_a_model_that_the_backend_cannot_cut(refused: Refused, monkeypatch) -> None:
    """It is asked before any weight is read, in a dry run, too."""

    def check(self, model, table) -> None:
        raise ConfigError(f"{len(model.model.layers)} layers, {table.max_unsharded_params}")

    monkeypatch.setattr(XlaBackend, "check", check)
    assert refused("dry_run=true") == "2 layers, 1000000" == refused()


def test_mesh_product_is_not_the_device_count(refused: Refused) -> None:
    message = refused("ici_mesh.tensor=1")
    assert "fsdp=2" in message and "= 2 devices, but there are 4" in message
    assert "Make the product 4" in message and "CPU_NUM_DEVICES" in message


@pytest.mark.parametrize(
    ("overrides", "divisor"),
    [
        (["ici_mesh.data=2", "ici_mesh.tensor=1"], 4),
        (["task.gradient_accumulation_steps=3"], 6),
    ],
)
def test_batch_not_divisible(overrides: list[str], divisor: int, refused: Refused) -> None:
    message = refused("task.global_batch_size=10", *overrides)
    assert f"task.global_batch_size: given 10, expected a multiple of {divisor} = " in message
    for factor in ("data", "fsdp", "task.gradient_accumulation_steps"):
        assert factor in message
    assert re.search(r"Set task.global_batch_size=(8|12),", message)


# The checkpoint ---------------------------------------------------------------------------------


def test_tokenizer_has_more_ids_than_the_model(
    refused: Refused, make_tokenizer_folder, tmp_path: Path
) -> None:
    other = make_tokenizer_folder(tmp_path / "other", ["<one>", "<two>", "<three>"])
    message = refused(f"model.tokenizer_name={other}")
    assert str(other) in message
    assert "ids up to 262" in message and "vocab_size is 260" in message
    assert "Set model.tokenizer_name" in message and "model.resize_embeddings=mean" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ('add_special_tokens=[""]', ["add_special_tokens[0]: given ''", "more than white space"]),
        ('add_special_tokens=["<a>","  "]', ["add_special_tokens[1]: given", "white space"]),
        ('add_special_tokens=["<a>","<b>","<a>"]', ["[2]: given '<a>'", "[0] is the same"]),
        ("add_special_tokens=[7]", ["add_special_tokens[0]: given 7, expected text"]),
        ("add_special_tokens=answer", ["given 'answer', expected a list", "=[answer]"]),
        ("pad_vocab_to_multiple=0", ["pad_vocab_to_multiple: given 0, expected at least 1"]),
        (
            "resize_embeddings=mode",
            ["resize_embeddings: given 'mode', expected one of mean, zeros"],
        ),
    ],
)
def test_new_tokens_that_cannot_be(override: str, parts: list[str], refused: Refused) -> None:
    message = refused(f"model.{override}")
    assert message.startswith("model.") and all(part in message for part in parts), message


def test_missing_and_unexpected_weights_are_all_listed(
    refused: Refused, changed_weights, tiny: Path
) -> None:
    missing = [
        "model.layers.0.mlp.gate_proj.weight",
        "model.layers.1.self_attn.k_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ]
    unexpected = ["model.layers.0.self_attn.q_proj.bias", "model.layers.2.mlp.up_proj.weight"]

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in missing:
            del tensors[name]
        for name in unexpected:
            tensors[name] = torch.zeros(16)

    folder = changed_weights(change)
    message = refused(f"model.pretrained_model={folder}")
    assert str(folder) in message
    assert "config.json" in message
    lost, _, strange = message.partition("Not known to the model (2):")
    assert "Missing from the files (4):" in lost
    assert set(re.findall(r"^  (\S+)$", lost, re.MULTILINE)) == set(missing)
    assert set(strange.split()) == set(unexpected)


def test_shape_mismatch(refused: Refused, changed_weights) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(48, 16)
        tensors["lm_head.weight"] = torch.zeros(256, 16)

    message = refused(f"model.pretrained_model={changed_weights(change)}")
    assert (
        "model.layers.1.mlp.up_proj.weight: [48, 16] in the file, [32, 16] in the model" in message
    )
    assert "lm_head.weight: [256, 16] in the file, [260, 16] in the model" in message


def test_no_weights_at_all(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bare"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    message = refused(f"model.pretrained_model={folder}")
    assert str(folder) in message and "*.safetensors" in message


def test_weights_cut_short(refused: Refused, tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny, folder)
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])
    message = refused(f"model.pretrained_model={folder}")
    assert str(folder / WEIGHTS) in message
    assert f"{len(whole) // 2} bytes" in message and "fetch this file again" in message


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.pretrained_model=nobody/no-such-model"], "nobody/no-such-model"),
        (["model.tokenizer_name=nobody/no-such-tokenizer"], "nobody/no-such-tokenizer"),
        (
            ["dataset.file_dataset_path=null", "dataset.hf_dataset_name=nobody/no-such-rows"],
            "dataset.hf_dataset_name=nobody/no-such-rows",
        ),
    ],
)
def test_hub_name_without_network(overrides: list[str], named: str, refused: Refused) -> None:
    started = time.perf_counter()
    message = refused(*overrides)
    assert time.perf_counter() - started < 10
    assert named in message
    assert "local" in message  # what to give instead
    assert "HF_HUB_OFFLINE" in message


# Rows -------------------------------------------------------------------------------------------


@pytest.fixture
def rows_file(tmp_path: Path, rows) -> Callable[..., Path]:
    """A copy of the training rows with some lines replaced, counted from 1."""

    def make(replaced: dict[int, str]) -> Path:
        lines = rows[0].read_text().splitlines()
        for number, line in replaced.items():
            lines[number - 1] = line
        path = tmp_path / "mine.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return path

    return make


def test_missing_dataset_file(refused: Refused, rows) -> None:
    wrong = rows[0].with_name("trian.jsonl")
    message = refused(f"dataset.file_dataset_path={wrong}")
    assert message.startswith(f"dataset.file_dataset_path={wrong} does not exist")
    assert "Did you mean train.jsonl" in message


def test_missing_heldout_file(refused: Refused, tmp_path: Path) -> None:
    message = refused("eval=file", f"eval.file_dataset_path={tmp_path / 'none.jsonl'}")
    assert message.startswith(f"eval.file_dataset_path={tmp_path / 'none.jsonl'} does not exist")


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_dataset(content: str, refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)
    message = refused(f"dataset.file_dataset_path={path}")
    assert str(path) in message and "dataset.file_dataset_path" in message
    assert "0 rows, expected at least one" in message


def test_malformed_line(refused: Refused, rows_file) -> None:
    path = rows_file({23: '{"prompt": "a", "completion": "b"'})
    message = refused(f"dataset.file_dataset_path={path}")
    assert "1 of 34 rows cannot be read" in message
    assert "malformed JSON: 1 (mine.jsonl:23; the first: " in message
    assert "dataset.max_unreadable_rows allows 0" in message and "Correct the file" in message


def test_malformed_line_that_is_allowed(command, run, rows_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = rows_file({23: '{"prompt": "a", "completion": "b"'})
    allowed = "dataset.max_unreadable_rows=1"
    assert run(command(f"dataset.file_dataset_path={path}", allowed, "dry_run=true")) == 0
    assert "1 rows rejected (malformed JSON: 1 (mine.jsonl:23;" in capsys.readouterr().err


def test_rows_without_fields_past_the_limit(refused: Refused, rows_file) -> None:
    bad = json.dumps({"prompt": "what?", "answer": "no completion"})
    path = rows_file({5: bad, 17: bad})
    message = refused(f"dataset.file_dataset_path={path}")
    assert "2 of 34 rows (5.9%) are rejected" in message
    assert "field completion is missing: 2 (mine.jsonl:5, mine.jsonl:17; the first: " in message
    assert "dataset.max_rejected_fraction allows 5.0%" in message and "raise" in message


def test_rows_without_fields_within_the_limit_are_reported(
    command, run, rows_file, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    path = rows_file({5: json.dumps({"prompt": "what?"})})
    assert run(command(f"dataset.file_dataset_path={path}", "dry_run=true")) == 0
    assert "1 rows rejected (field completion is missing: 1 (mine.jsonl:5; the first: " in (
        capsys.readouterr().err
    )


# Folders ----------------------------------------------------------------------------------------


def test_output_folder_holds_another_run(refused: Refused, tmp_path: Path) -> None:
    folder = tmp_path / "outputs" / "mine"
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    message = refused()
    assert "outputs/mine already holds another run" in message
    assert "output_dir" in message and "run_name=" in message


def test_output_folder_is_a_file(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("not a folder")
    message = refused()
    assert "output_dir" in message and "outputs" in message


@pytest.mark.parametrize("place", ["file", "folder"])
def test_export_folder_already_used(place: str, refused: Refused, tmp_path: Path) -> None:
    target = tmp_path / "mine" / "exported"
    target.parent.mkdir()
    if place == "file":
        target.write_text("something else")
    else:
        target.mkdir()
        (target / "config.json").write_text("{}")
    message = refused(f"task.export_checkpoint_path={target}")
    assert str(target) in message
    assert "task.export_checkpoint_path" in message and "Choose another folder" in message


# A loss that is not finite ----------------------------------------------------------------------


def test_diverged_run_keeps_the_weights_before(
    command, run, order_of, tiny: Path, tmp_path: Path, capsys
) -> None:
    """The run is shorter than logging_steps: only the end looks, the device must have watched."""
    argv = command(
        "task.optimizer.learning_rate=1e30",
        "task.lr_scheduler.name=constant",
        "logging_steps=100",
        f"output_dir={tmp_path}",
        "run_name=mine",
    )
    code = run(argv)
    out, err = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in out + err
    message = one_error(err)
    assert "step 2 is not finite" in message
    assert f"(batch {order_of(argv).batch(1).hash()})" in message
    assert "task.optimizer.learning_rate" in message
    kept = tmp_path / "mine" / "checkpoints" / "before_divergence"
    assert f"kept in {kept}" in message
    assert not (tmp_path / "mine" / "export").exists()

    weights = LlamaForCausalLM.from_pretrained(kept).state_dict()
    base = LlamaForCausalLM.from_pretrained(tiny).state_dict()
    assert weights.keys() == base.keys()
    assert all(torch.isfinite(weight).all() for weight in weights.values())
    # Those after step 1, which moved them by the learning rate, and not those of the start.
    name = "model.layers.0.mlp.up_proj.weight"
    assert (weights[name] - base[name]).abs().max() == pytest.approx(1e30, rel=1e-3)


def test_weights_that_are_nan_from_the_start(
    command, run, order_of, changed_weights, tmp_path: Path, capsys
) -> None:
    """There is nothing sound to keep; that must not hide which step and batch it was."""
    folder = changed_weights(lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    argv = command(
        f"model.pretrained_model={folder}", f"output_dir={tmp_path / 'out'}", "run_name=mine"
    )
    code = run(argv)
    out, err = capsys.readouterr()
    assert code == 2
    assert "Traceback" not in out + err
    message = one_error(err)
    assert "step 1 is not finite" in message
    assert f"(batch {order_of(argv).batch(0).hash()})" in message
    assert "model.layers.1.mlp.up_proj.weight holds NaN" in message
    assert "kept in" not in message
    left = [path.name for path in (tmp_path / "out").rglob("*.safetensors")]
    assert left == []
    assert not (tmp_path / "out" / "mine" / "export").exists()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["adapter.targets=[q_prj]"], "'q_prj', which matches no linear layer.* q_proj"),
        (
            ["adapter.targets=[lm_head]"],
            "adapter.targets: given lm_head, which the loss multiplies",
        ),
        (["adapter.rank=17"], "adapter.rank: given 17, expected at most 16|at most 8"),
        (["adapter.layers=[2]"], "adapter.layers: given 2, expected numbers from 0 to 1"),
        (["adapter.modules_to_train=[nrm]"], "'nrm', which is no module"),
        (["adapter.modules_to_train=[q_proj]"], "is also in adapter.targets"),
        (["adapter.pretrained=."], "adapter_config.json"),
    ],
)
def test_an_adapter_that_does_not_fit(refused: Refused, overrides: list[str], message: str) -> None:
    assert re.search(message, refused("adapter=lora", "adapter.rank=4", *overrides))
