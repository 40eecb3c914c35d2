"""Whole runs with new special tokens, held to transformers' own way of adding and resizing."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interrupted import Killed, records
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from torchprime.checkpoint.proof.certificate import read_certificate
from torchprime.checkpoint.proof.recheck import recheck
from torchprime.cli.main import main
from torchprime.config.compose import compose_config
from torchprime.config.entry import run_main
from torchprime.data.blocks.batch import Batch
from torchprime.torch_native.train import main as native
from torchprime.torch_xla_models.train import main as xla
from torchprime.training.loop import DataOrder
from torchprime.training.setup.datasets import prepare_run_data
from torchprime.training.setup.recipe import files_of

TOKENS = ["<answer>", "</answer>", "<pad>"]
IDS = {"<answer>": 260, "</answer>": 261}
BEFORE, ROWS, LR, STEPS, BLOCK = 260, 384, 0.01, 4, 64
ALONE = ("ici_mesh.fsdp=1", "ici_mesh.tensor=1")


@pytest.fixture(scope="module")
def marked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose answers are between new tokens, and whose questions name one."""
    path = tmp_path_factory.mktemp("marked") / "rows.jsonl"
    answers = [f"so <answer>{n}{n % 7 * 'ab'}</answer>" for n in range(1, 40)]
    rows = [{"prompt": f"give {n} in <answer>: ", "completion": a} for n, a in enumerate(answers)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def argv(command, marked: Path) -> Callable[..., list[str]]:
    def make(folder: Path, *more: str) -> list[str]:
        return command(
            f"model.add_special_tokens={json.dumps(TOKENS)}",
            f"dataset.file_dataset_path={marked}",
            f"task.max_steps={STEPS}",
            f"task.optimizer.learning_rate={LR}",
            "task.lr_scheduler.name=constant",
            "checkpoint.every_steps=2",
            "dataset.eval_fraction=0.1",
            "logging_steps=1",
            f"output_dir={folder.parent}",
            f"run_name={folder.name}",
            *more,
        )

    return make


class Run:
    """A finished run and what it printed."""

    def __init__(self, folder: Path, argv: list[str], entry: Callable[..., Any]) -> None:
        self.folder, self.argv, self.entry = folder, argv, entry
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            assert run_main(entry, argv) == 0, printed.getvalue()
        self.printed = printed.getvalue()
        self.losses = [record["loss"] for record in records(folder)]
        self.export = folder / "export"


WAYS = {"alone": (native, ALONE), "xla-fsdp2-tensor2": (xla, ())}


@pytest.fixture(
    scope="module", params=["alone", pytest.param("xla-fsdp2-tensor2", marks=pytest.mark.slow)]
)
def trained(request: pytest.FixtureRequest, argv, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Answers of base and export are shown at the end."""
    entry, mesh = WAYS[request.param]
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return Run(folder, argv(folder, "task.sample_prompts=2", *mesh), entry)


def batches_of(argv: list[str]) -> list[Batch]:
    config = compose_config(argv)
    tokenizer = files_of(config, weights=False).tokenizer
    data = prepare_run_data(config, tokenizer, None, lambda _: None).train
    order = DataOrder(data, config.seed, config.task.global_batch_size)
    return [order.batch(step) for step in range(STEPS)]


def loss_of(model: LlamaForCausalLM, batch: Batch) -> Tensor:
    segments = torch.from_numpy(batch.segment_ids)
    seen = (segments[:, :, None] == segments[:, None, :]) & torch.ones(BLOCK, BLOCK).tril().bool()
    logits = model(
        input_ids=torch.from_numpy(batch.input_ids).long(),
        position_ids=torch.from_numpy(batch.position_ids).long(),
        attention_mask=torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None],
    ).logits
    targets = torch.from_numpy(batch.targets).long().flatten()
    each = F.cross_entropy(logits.flatten(0, 1), targets, reduction="none")
    weights = torch.from_numpy(batch.loss_weights).flatten()
    return (each * weights).sum() / weights.sum()


def resized(tiny: Path) -> LlamaForCausalLM:
    """The model after transformers' own additions to tokenizer and embeddings."""
    tokenizer: Any = AutoTokenizer.from_pretrained(tiny)
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    assert [tokenizer.convert_tokens_to_ids(token) for token in TOKENS] == [260, 261, 2]
    model: Any = LlamaForCausalLM.from_pretrained(
        tiny, dtype=torch.float32, attn_implementation="eager"
    )
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=128, mean_resizing=True)
    assert model.model.embed_tokens.weight.shape == model.lm_head.weight.shape == (ROWS, 16)
    return model


def reference_losses(model: LlamaForCausalLM, argv: list[str]) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    losses = []
    for batch in batches_of(argv):
        assert (batch.input_ids >= BEFORE).any()
        loss = loss_of(model, batch)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return losses


def test_losses_are_those_of_the_model_that_transformers_resizes(trained: Run, tiny: Path) -> None:
    expected = reference_losses(resized(tiny), trained.argv)
    assert trained.losses == pytest.approx(expected, rel=1e-5)


def test_the_plan_says_what_becomes_of_the_vocabulary(trained: Run) -> None:
    for line in (
        "vocabulary   260 -> 262 tokens, embeddings 384 rows (resized from 260); 124 new rows: the "
        "mean of the others plus small noise",
        "new tokens   '<answer>' 260, '</answer>' 261",
        "kept         '<pad>' 2 (special tokens already)",
    ):
        assert f"  {line}\n" in trained.printed
    told = json.loads((trained.folder / "run.json").read_text())["model"]["vocabulary"]
    assert told["rows"] == ROWS and told["new_tokens"] == IDS
    assert "base     [not asked: it has no row for a token of this prompt]" in trained.printed


def test_the_export_has_the_tokens_and_the_rows(trained: Run) -> None:
    config = json.loads((trained.export / "config.json").read_text())
    assert config["vocab_size"] == ROWS
    for read in (AutoTokenizer, PreTrainedTokenizerFast):
        tokenizer: Any = read.from_pretrained(trained.export)
        assert tokenizer("a<answer>b</answer>")["input_ids"][1::2] == list(IDS.values())
        assert set(TOKENS) <= set(tokenizer.all_special_tokens)
    model = LlamaForCausalLM.from_pretrained(trained.export)
    assert model.model.embed_tokens.weight.shape == model.lm_head.weight.shape == (ROWS, 16)


def test_its_certificate_counts_the_new_rows(trained: Run, tiny: Path) -> None:
    certificate = read_certificate(trained.export)
    assert not certificate.failed and certificate.check("logits").passed
    assert certificate.check("base").values["new_rows"] == 2 * (ROWS - BEFORE)
    verdicts = {check.name: check.passed for check in recheck(trained.export, tiny)[1]}
    assert verdicts["base"] and False not in verdicts.values()


def test_the_same_export_comes_from_the_checkpoint(trained: Run, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    assert main(["export", str(trained.folder), "--out", str(out)]) == 0
    files = [path for path in trained.export.rglob("*") if path.is_file()]
    for path in files:
        if path.name != "certificate.json":
            assert (out / path.relative_to(trained.export)).read_bytes() == path.read_bytes()
    assert read_certificate(out).check("base").passed


def test_a_run_that_goes_on_is_exact_and_other_tokens_are_refused(
    trained: Run, argv, killed_after, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cut"
    mesh = [each for each in trained.argv if each.startswith("ici_mesh")]
    killed_after(2)
    with pytest.raises(Killed):
        run_main(trained.entry, argv(folder, *mesh))
    for change, message in (
        ('model.add_special_tokens=["<answer>"]', "refused      model.add_special_tokens: ['<answ"),
        ("model.resize_embeddings=zeros", "refused      model.resize_embeddings: null -> zeros"),
        (
            "model.pad_vocab_to_multiple=256",
            "refused      model.pad_vocab_to_multiple: null -> 256",
        ),
    ):
        assert run_main(trained.entry, argv(folder, *mesh, change)) == 2
        assert message in capsys.readouterr().err
    assert run_main(trained.entry, argv(folder, *mesh)) == 0
    assert records(folder) == records(trained.folder)
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert (folder / "export" / name).read_bytes() == (trained.export / name).read_bytes()


def test_inspect_and_prepare_read_the_same_tokens(
    trained: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["inspect", *trained.argv, f"output_dir={tmp_path}"]) == 0
    out, err = capsys.readouterr()
    assert "<answer>" in out and "vocabulary   260 -> 262 tokens" in err and "found prepared" in err
    assert main(["prepare", *trained.argv]) == 0
