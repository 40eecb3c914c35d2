"""Exports of whole runs: certified, made again from a checkpoint, and failing where they should."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import tokenizers
import torch
from forks import Ended, ForkServer
from transformers import LlamaForCausalLM

from torchprime.adapters.spec import AdapterSpec
from torchprime.checkpoint.hf.card import CardFacts
from torchprime.checkpoint.hf.write import WeightLayout
from torchprime.checkpoint.places import ExportPlace
from torchprime.checkpoint.proof.certificate import read_certificate
from torchprime.checkpoint.proof.recheck import recheck
from torchprime.checkpoint.proof.verify import load_transformers
from torchprime.cli.main import main
from torchprime.data.templates.render import ChatTemplate
from torchprime.errors import CheckpointError
from torchprime.sharding import ShardingTable
from torchprime.training.processes import OneProcess, Processes
from torchprime.training.run.export import Exporter
from torchprime.training.setup.adapter import Adapter

STEPS, EVERY = 4, 2
LAST, MIDDLE = f"step_{STEPS:08d}", f"step_{EVERY:08d}"


def contents(folder: Path) -> dict[str, bytes]:
    """All but the certificate."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    assert files.pop("certificate.json")
    return files


@pytest.fixture(scope="module")
def job(command, run, rows, tmp_path_factory) -> Callable[..., Path]:
    """Run the SFT job with checkpoints, on fsdp=2 x tensor=2; its folder."""
    out = tmp_path_factory.mktemp("runs")

    def go(name: str, *overrides: str, code: int = 0) -> Path:
        argv = command(
            f"task.max_steps={STEPS}",
            f"checkpoint.every_steps={EVERY}",
            "checkpoint.keep_last=null",
            "eval=file",
            f"eval.file_dataset_path={rows[1]}",
            "logging_steps=3",
            f"output_dir={out}",
            f"run_name={name}",
            *overrides,
        )
        printed = io.StringIO()
        with contextlib.redirect_stderr(printed):
            found = run(argv)
        assert found == code, printed.getvalue()
        (out / f"{name}.txt").write_text(printed.getvalue())
        return out / name

    return go


@pytest.fixture(scope="module")
def done(job) -> Path:
    return job("done")


# From a checkpoint --------------------------------------------------------------------------------


@pytest.fixture
def torchprime(fork_server: ForkServer, tmp_path: Path) -> Callable[..., Ended]:
    """A command in a process of its own, in which XLA cannot be had."""
    script = tmp_path / "without_xla.py"
    script.write_text(
        "import sys\n"
        "assert not {'torch_xla', 'jax'} & set(sys.modules)\n"
        "sys.modules['torch_xla'] = sys.modules['jax'] = None\n"
        "from torchprime.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    return lambda *argv: fork_server.start(script, *argv).end()


def test_an_export_of_the_last_checkpoint_is_the_runs_own(
    torchprime: Callable[..., Ended], done: Path, tmp_path: Path
) -> None:
    """To the byte, on a machine without XLA, while the rows are gone; and both verify."""
    out = tmp_path / "out"
    ended = torchprime("export", str(done / "checkpoints" / LAST), "--out", str(out))
    assert ended.code == 0, ended.printed
    assert contents(out) == contents(done / "export")
    assert "logits of transformers match" in ended.printed
    ended = torchprime("verify", str(out))
    assert ended.code == 0, ended.printed
    assert not [check for check in recheck(done / "export")[1] if check.passed is False]


def test_an_earlier_checkpoint_has_its_own_step_and_metrics(
    done: Path, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setenv("USE_TORCH_XLA", "1")  # put back on leaving, whatever main makes of it
    assert main(["export", str(done / "checkpoints" / MIDDLE), "--out", str(tmp_path / "a")]) == 0
    early, late = read_certificate(tmp_path / "a"), read_certificate(done / "export")
    assert (early.step, late.step) == (EVERY, STEPS)
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    evals = [line["eval_loss"] for line in lines if line["kind"] == "eval"]
    (*_, last) = [line["loss"] for line in lines if line["kind"] == "train"]
    assert late.metrics == {
        "train loss of the last step": last,
        "held-out loss before": evals[0],
        "held-out loss after": evals[-1],
    }
    assert early.metrics == {}  # nothing was logged by then
    assert f"| steps | {EVERY} |" in (tmp_path / "a" / "README.md").read_text()
    card = json.loads((done / "checkpoints" / LAST / "hf" / "export.json").read_text())["card"]
    assert (card["hub_model"], card["hub_datasets"]) == (None, []), "model and rows are local"
    assert (
        early.check("base").values["largest_change"] < late.check("base").values["largest_change"]
    )


def test_periodic_checkpoints_may_be_loadable_folders(job) -> None:
    folder = job("loadable", "checkpoint.hf=true", "task.export_checkpoint_path=export")
    for name in (MIDDLE, LAST):
        hf = folder / "checkpoints" / name / "hf"
        weights = load_transformers(hf).state_dict()
        assert not [check for check in recheck(hf)[1] if check.passed is False]
    exported = load_transformers(folder / "export").state_dict()
    assert weights.keys() == exported.keys()
    assert all(torch.equal(weights[name], exported[name]) for name in exported)


# The run's own certificate ------------------------------------------------------------------------


def test_a_runs_certificate_says_what_ran(done: Path, tiny: Path) -> None:
    certificate = read_certificate(done / "export")
    assert {check.name for check in certificate.checks if check.passed is None} == {"chat template"}
    assert not certificate.failed
    facts = json.loads((done / "run.json").read_text())
    config = hashlib.sha256((done / "config.yaml").read_bytes()).hexdigest()
    assert certificate.fingerprints == {**facts["fingerprints"], "config": config}
    assert certificate.versions == facts["versions"]
    assert certificate.base_model == str(tiny)
    values = certificate.check("logits").values
    assert values["computed_by"].startswith("the trainer (") and "4 x CPU" in values["computed_by"]


def test_the_certified_logits_are_those_of_the_trained_model(done: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(done / "export").eval()
    raw = tokenizers.Tokenizer.from_file(str(done / "export" / "tokenizer.json"))
    for prompt in read_certificate(done / "export").check("logits").values["prompts"]:
        ids = raw.encode(prompt["text"], add_special_tokens=False).ids[: prompt["tokens"]]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        for token, value in prompt["likeliest_next"].items():
            assert logits[int(token)].item() == pytest.approx(value, rel=1e-4, abs=1e-5)


def test_a_failed_certificate_ends_the_run_and_keeps_the_weights(job, monkeypatch) -> None:
    """Make the trainer compute something other than its export, as a wrong kernel would."""
    from torchprime.torch_xla_models.backend import XlaBackend

    plain = XlaBackend.logits
    monkeypatch.setattr(XlaBackend, "logits", lambda self, ids: plain(self, ids) * 1.01)
    folder = job("wrong", code=2)
    said = folder.with_suffix(".txt").read_text()
    assert "error: The export in" in said and "\n  logits: " in said and "Traceback" not in said
    certificate = read_certificate(folder / "export")
    assert [check.name for check in certificate.failed] == ["logits"]
    assert load_transformers(folder / "export")
    assert not list(folder.glob(".export*"))
    monkeypatch.undo()
    job("wrong", code=2)  # the run is complete, and its export as bad as before
    shutil.rmtree(folder / "export")
    job("wrong")
    assert not read_certificate(folder / "export").failed


# Several processes --------------------------------------------------------------------------------


class Member(Processes):
    """One of two processes, which exchange nothing here."""

    def __init__(self, index: int) -> None:
        super().__init__(index, 2)

    def gather(self, value: Any) -> NoReturn:
        raise AssertionError("an exchange that the other process does not know of")


class Group:
    """A backend that counts what every process of a group has to do together."""

    name, device_count, device_kind = "group", 2, "none"

    def __init__(self, index: int) -> None:
        self.processes: Processes = Member(index)
        self.done: list[str] = []

    def logits(self, ids: list[int]) -> torch.Tensor:
        self.done.append(f"logits of {len(ids)}")
        return torch.zeros(len(ids), 260)

    def weights(self):
        for name in ("first", "second"):
            self.done.append(name)
            yield name, torch.ones(1)


@pytest.fixture
def exporter(done: Path, tiny: Path) -> Exporter:
    from torchprime.training.setup.model_files import find_model

    files = find_model(
        pretrained_model=str(tiny),
        tokenizer_name=None,
        architecture=None,
        cache_dir=None,
        weights=False,
    )
    return Exporter(
        files,
        layout=WeightLayout(files.shapes, torch.float32, 10**9),
        card=CardFacts(),
        template=None,
        stop_ids=[],
        fingerprints={},
        say=lambda line: None,
    )


@pytest.mark.parametrize("fails_at", ["before the first", "after the first", "after the last"])
def test_processes_do_the_same_also_when_the_first_cannot_write(
    exporter: Exporter, tmp_path: Path, monkeypatch, fails_at: str
) -> None:
    def failing(out: Path, weights: Any, *_: Any) -> None:
        taken = {"before the first": 0, "after the first": 1, "after the last": 2}[fails_at]
        for _step in range(taken):
            next(weights)
        raise CheckpointError("no space left")

    monkeypatch.setattr(exporter, "_export", failing)
    first, second = Group(0), Group(1)
    with pytest.raises(CheckpointError, match="no space left"):
        exporter.write(tmp_path / "out", first, {}, step=1)  # type: ignore[arg-type]
    exporter.write(tmp_path / "out", second, {}, step=1)  # type: ignore[arg-type]
    assert first.done == second.done == [*["logits of 64"] * 3, "first", "second"]


def test_without_room_a_group_computes_logits_and_one_process_none(
    exporter: Exporter, monkeypatch
) -> None:
    monkeypatch.setattr("torchprime.training.run.export.no_room", lambda *_: "too small")
    group = Group(0)
    assert exporter._trained_logits(group) == "too small"  # type: ignore[arg-type]
    assert len(group.done) == 3
    alone = Group(0)
    alone.processes = OneProcess()
    assert exporter._trained_logits(alone) == "too small"  # type: ignore[arg-type]
    assert not alone.done


@pytest.mark.parametrize("form", ["adapter", "merged", "both"])
def test_an_adapters_export_is_checked_without_weights(
    exporter: Exporter, tmp_path: Path, monkeypatch, form: Any
) -> None:
    def opened(*_: object) -> NoReturn:
        raise AssertionError("the base's files are opened")

    monkeypatch.setattr("torchprime.training.run.export.pretrained_tensors", opened)
    adapter = Adapter(AdapterSpec(rank=4, alpha=8), ShardingTable({}, {}), {}, form)
    exporter.files = replace(exporter.files, adapter=adapter)
    exporter.card = CardFacts(base_model="owner/base")
    exporter.check(tmp_path / "out")
    assert exporter.need(ExportPlace.of(tmp_path / "out")).bytes > 0
    assert not (tmp_path / "out").exists()


def test_the_card_knows_of_conversations(exporter: Exporter) -> None:
    assert "apply_chat_template" not in exporter.facts(1, {}).card_text()
    exporter.template = ChatTemplate("t", "{{ messages }}", options=(("thinking", "false"),))
    facts = exporter.facts(1, {})
    assert "apply_chat_template" in facts.card_text()
    assert facts.template == hashlib.sha256(b"{{ messages }}").hexdigest()
    assert """--default-chat-template-kwargs '{"thinking": false}'""" in facts.card_text()
    assert "    thinking=False)" in facts.card_text()
