"""`torchprime evaluate` and `sample` as a user runs them, on the shipped model.

A run of a few steps evaluates itself after the last one: that is what evaluate has to repeat.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from torchprime.cli.main import main

COMMON = (
    "--config-name", "quickstart", "dataset.max_train_examples=64", "dataset.leak_check=off",
    "eval.max_examples=24", "eval.generate.max_examples=12", "eval.generate.max_new_tokens=12",
    "eval.generate.batch_size=12", "selection.gates=[]", "export.which=last",
)  # fmt: skip
MESH = {"xla": (), "native": ("mesh=single",)}
SAMPLED = ("--answers", "3", "--limit", "8", "--max-new-tokens", "24", "--right", "digit")
DIGIT = "eval.graders=[{name: digit, kind: regex, pattern: '[0-4]'}]"

RunOn = Callable[[str], Path]


@pytest.fixture(scope="module")
def run_on(tmp_path_factory: pytest.TempPathFactory) -> RunOn:
    """Return the folder of a run on a backend, made once."""
    folder = tmp_path_factory.mktemp("runs")

    @cache
    def make(backend: str) -> Path:
        more = ["task.max_steps=2", "eval.every_steps=2", "task.sample_prompts=0"]
        more += [f"output_dir={folder}", f"run_name={backend}"]
        assert main(["train", "--backend", backend, *COMMON, *MESH[backend], *more]) == 0
        return folder / backend

    return make


def evaluated(model: Path, out: Path, engine: str, *more: str) -> tuple[dict[str, Any], bytes]:
    """Return the record and the samples of `evaluate`."""
    argv = [str(model), "--out", str(out), "--engine", engine, *COMMON, *MESH[engine]]
    assert main(["evaluate", *argv, *more]) == 0
    content = json.loads((out / "evaluation.json").read_text())
    return content["evaluation"], (out / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("backend", [pytest.param("xla", marks=pytest.mark.slow), "native"])
def test_an_export_is_evaluated_as_its_run_did(
    run_on: RunOn, backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = run_on(backend)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    of_run = [line for line in lines if line["kind"] == "eval"][-1]
    samples = (run / "evaluations" / "step_00000002.jsonl").read_bytes()
    record, found = evaluated(run / "export", tmp_path / "own", backend)
    for key in ("eval_loss", "eval_perplexity", "eval_supervised_tokens", "scores"):
        assert record[key] == of_run[key], key
    assert found == samples
    table = capsys.readouterr().out
    assert re.search(rf"^eval_loss +{of_run['eval_loss']:.4f}$", table, re.MULTILINE)
    assert re.search(r"^format_pass \(n=12\) +0\.0% \(0\.0 to 24\.2\)$", table, re.MULTILINE)


def test_the_backends_agree_on_an_export(run_on: RunOn, tmp_path: Path) -> None:
    export = run_on("native") / "export"
    found = {engine: evaluated(export, tmp_path / engine, engine) for engine in MESH}
    assert found["xla"][1] == found["native"][1]  # greedy answers
    losses = [record["eval_loss"] for record, _ in found.values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_adapter_is_evaluated_beside_its_base(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where the config names no adapter, or none of these ranks, nor a model or length."""
    argv = [*COMMON, "mesh=single", "adapter=lora", "adapter.rank=4", "export.adapter=adapter"]
    argv += ["task.max_steps=2", "eval.every_steps=2", "task.sample_prompts=0"]
    argv += [f"output_dir={tmp_path}", "run_name=run"]
    assert main(["train", "--backend", "native", *argv]) == 0
    lines = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    record, samples = evaluated(tmp_path / "run" / "export", tmp_path / "out", "native")
    assert record["eval_loss"] == [x for x in lines if x["kind"] == "eval"][-1]["eval_loss"]
    content = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert content["sha256"].keys() == {"weights", "adapter"}
    less = ("model.pretrained_model=null", "task.max_steps=null")
    again, same = evaluated(tmp_path / "run" / "export", tmp_path / "less", "native", *less)
    assert (again["eval_loss"], same) == (record["eval_loss"], samples)
    vllm = ["--engine", "vllm", "--url", "http://127.0.0.1:1/v1", *COMMON, "mesh=single"]
    assert main(["evaluate", str(tmp_path / "run" / "export"), "--out", "none", *vllm]) == 2
    assert "--engine: given 'vllm', expected xla or native" in capsys.readouterr().err


def sample(out: Path, engine: str, *more: str) -> bytes:
    base = "torchprime/assets/quickstart/base"
    argv = [base, "--out", str(out), "--engine", engine, *SAMPLED, *COMMON, *MESH[engine]]
    assert main(["sample", *argv, DIGIT, *more]) == 0
    return (out / "samples.jsonl").read_bytes()


def test_a_sampled_answer_depends_on_its_row_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repo_dir: Path, run: Callable
) -> None:
    """Not on the batch, nor on the backend; the kept rows train as they are."""
    monkeypatch.chdir(repo_dir)
    found = sample(tmp_path / "one", "native")
    assert sample(tmp_path / "two", "native", "eval.generate.batch_size=7") == found
    assert sample(tmp_path / "xla", "xla") == found
    rows = tmp_path / "one" / "rows.jsonl"
    kept = [json.loads(line) for line in rows.read_text().splitlines()]
    assert 0 < len(kept) <= 24 and all(set(row["completion"]) & set("01234") for row in kept)
    given = [f"dataset.file_dataset_path={rows}", "dataset.eval_fraction=null", "dataset=file"]
    assert main(["prepare", "--config-name", "quickstart", "eval=none", *given]) == 2
    given += ["task.sample_prompts=0"]
    assert main(["prepare", "--config-name", "quickstart", "eval=none", *given]) == 0


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["eval=none", "--out", "{tmp}/new"], "MODEL: given 'eval=none'"),
        (["{base}", "--out", "{tmp}/new", "--url", "http://127.0.0.1:1/v1"], "--engine vllm"),
        (["no/such", "--out", "{tmp}/new"], "There is no local folder no/such"),
        (["{base}", "--out", "{tmp}"], "--out: given '{tmp}', expected a new or empty folder"),
        (["{base}", "--out", "{tmp}/new", "eval=none", "task.sample_prompts=0"], "eval: given"),
        (["{base}", "--out", "{tmp}/new", "-m"], "-m: given with torchprime evaluate"),
    ],
)
def test_a_mistake_is_one_message(
    argv: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], repo_dir: Path
) -> None:
    (tmp_path / "file").touch()
    filled = {"tmp": tmp_path, "base": repo_dir / "torchprime" / "assets" / "quickstart" / "base"}
    given = [each.format(**filled) for each in argv]
    config = [] if "eval=none" in given else COMMON[4:]
    full = ["evaluate", *COMMON[:2], *given, "--engine", "native", *COMMON[2:4], *config]
    assert main(full) == 2
    error = capsys.readouterr().err
    assert said.format(**filled) in error and "Traceback" not in error
