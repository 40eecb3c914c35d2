"""Whole runs of the main job on four virtual devices, and its loop on a backend of plain Python."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import torch_xla.debug.metrics as xla_metrics
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoTokenizer, LlamaForCausalLM

from torchprime.config.compose import compose_config
from torchprime.config.load import load_config
from torchprime.data.blocks.batch import Batch
from torchprime.data.blocks.dataset import PackedDataset
from torchprime.data.tokens.completions import Example
from torchprime.errors import DivergedError, RecompileError
from torchprime.metrics.record import NESTED, StepRecord
from torchprime.metrics.throughput import Stopwatch
from torchprime.metrics.writers import read_metrics
from torchprime.torch_xla_models import backend as xla_backend
from torchprime.training.backend import StepNumbers
from torchprime.training.loop import BaseHook, CompileGuard, DataOrder, RunControl, TrainLoop
from torchprime.training.processes import OneProcess

STEPS, LOGGED, PEAK = 7, [3, 6, 7], 0.01
# Linear: up from 0 in 2 updates, then down to a tenth at update 7.
RATES = [0, PEAK / 2, PEAK, *(PEAK * (0.1 + 0.9 * (1 - n / 5)) for n in (1, 2, 3, 4))]


@dataclass
class Run:
    """A finished run: where, by which command, and what it said."""

    folder: Path
    argv: list[str]
    printed: str
    compiled: int

    @property
    def steps(self) -> list[dict[str, Any]]:
        return [r for r in read_metrics(self.folder / "metrics.jsonl") if r["kind"] == "train"]

    @property
    def evals(self) -> list[dict[str, Any]]:
        return [r for r in read_metrics(self.folder / "metrics.jsonl") if r["kind"] == "eval"]

    def losses(self) -> list[str]:
        """As written: digit for digit."""
        text = (self.folder / "metrics.jsonl").read_text()
        return re.findall(r'"(?:loss|grad_norm|eval_loss)": ([^,]+),', text)

    def report(self) -> dict[str, Any]:
        return json.loads((self.folder / "data_report.json").read_text())


def compiles() -> int:
    data = xla_metrics.metric_data("CompileTime")
    return 0 if data is None else int(data[0])


@pytest.fixture(scope="module")
def sft(command, run, rows, tmp_path_factory) -> Callable[..., Run]:
    """Run the SFT job on fsdp=2 x tensor=2 with these overrides on top."""
    out = tmp_path_factory.mktemp("runs")

    def go(name: str, *overrides: str) -> Run:
        given = (
            f"task.max_steps={STEPS}",
            f"task.optimizer.learning_rate={PEAK}",
            "task.lr_scheduler.name=linear",
            "task.lr_scheduler.warmup_steps=2",
            "task.lr_scheduler.min_lr_ratio=0.1",
            "eval=file",
            f"eval.file_dataset_path={rows[1]}",
            "eval.every_steps=4",
            "logging_steps=3",
            f"output_dir={out}",
            f"run_name={name}",
        )
        argv = command(*given, *overrides)
        before, printed = compiles(), io.StringIO()
        with contextlib.redirect_stderr(printed):
            assert run(argv) == 0, printed.getvalue()
        return Run(out / name, argv, printed.getvalue(), compiles() - before)

    return go


@pytest.fixture(scope="module")
def first(sft) -> Run:
    return sft("first")


# A whole run ------------------------------------------------------------------------------------


def test_a_record_per_logged_step(first: Run, order_of) -> None:
    assert [record["step"] for record in first.steps] == LOGGED
    fields = {field.name for field in dataclasses.fields(StepRecord)} - set(NESTED)
    order = order_of(first.argv)
    for record in first.steps:
        assert set(record) == fields | {"kind"}
        batch = order.batch(record["step"] - 1)
        assert record["batch_hash"] == batch.hash()
        assert record["supervised_tokens"] == batch.supervised_tokens
        assert record["real_tokens"] == batch.real_tokens
        assert record["slot_tokens"] == 4 * 64
        assert record["epoch"] == pytest.approx(record["step"] / order.steps_per_epoch)
        assert record["step_seconds"] > 0 and record["supervised_tokens_per_s"] > 0
        assert record["slot_tokens_per_s"] > record["supervised_tokens_per_s"]
        assert record["mfu"] is None and record["device_memory_bytes"] is None  # a CPU
        assert record["host_memory_bytes"] > 1e6


def test_learning_rate_recorded_is_the_one_used(first: Run) -> None:
    assert [record["lr"] for record in first.steps] == pytest.approx(
        [RATES[step - 1] for step in LOGGED]
    )


def test_held_out_loss_falls_and_is_that_of_transformers(first: Run, tiny: Path, rows) -> None:
    """Before the first step, every fourth and at the end; first and last against transformers on
    one unpacked row after the other."""
    assert [record["step"] for record in first.evals] == [0, 4, STEPS]
    before, _, after = (record["eval_loss"] for record in first.evals)
    assert after < before - 0.3
    held_out = [json.loads(line) for line in rows[1].read_text().splitlines()]
    assert before == pytest.approx(loss_in_transformers(tiny, held_out), rel=1e-5)
    assert after == pytest.approx(loss_in_transformers(first.folder / "export", held_out), rel=1e-5)


def loss_in_transformers(folder: Path, rows: list[dict[str, str]]) -> float:
    """Mean over the tokens of all completions and their stop."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    losses = []
    for row in rows:
        prompt, completion = (tokenizer.encode(row[key]).ids for key in ("prompt", "completion"))
        ids = torch.tensor([prompt + completion + [tokenizer.token_to_id("</s>")]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1]
        losses.append(
            torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="none")
        )
    return torch.cat(losses).mean().item()


def test_export_loads_and_differs_from_the_base(first: Run, tiny: Path) -> None:
    export = first.folder / "export"
    given: Any = LlamaForCausalLM.from_pretrained(export, output_loading_info=True)
    tuned, report = given
    assert not any(report.values()), report
    base = LlamaForCausalLM.from_pretrained(tiny).state_dict()
    assert tuned.state_dict().keys() == base.keys()
    for name, weight in tuned.state_dict().items():
        assert weight.shape == base[name].shape
        moved = (weight - base[name]).abs().max().item()
        # Adam moves a weight by at most about the learning rate per update.
        assert 1e-3 < moved < 2 * sum(RATES), name
    assert AutoTokenizer.from_pretrained(export).encode("say hi")
    assert "logits of transformers match" in first.printed


def test_run_folder_says_what_ran(first: Run, tiny: Path) -> None:
    config = compose_config(first.argv)
    assert load_config(yaml.safe_load((first.folder / "config.yaml").read_text())) == config
    facts = json.loads((first.folder / "run.json").read_text())
    assert facts["versions"].keys() >= {"torchprime", "torch", "torch_xla", "transformers"}
    assert facts["device"] == {"kind": "CPU", "count": 4}
    assert facts["mesh"]["fsdp"] == facts["mesh"]["tensor"] == 2
    assert facts["model"]["pretrained"] == str(tiny)
    assert facts["model"]["parameters"] == LlamaForCausalLM.from_pretrained(tiny).num_parameters()
    assert facts["plan"]["total_steps"] == STEPS
    data = first.report()
    assert facts["fingerprints"]["data"] == data["dataset"]["fingerprint"]
    assert facts["fingerprints"]["eval"] == data["eval"]["fingerprint"]
    assert data["dataset"]["rows"] == data["dataset"]["examples"] == 34
    assert data["eval"]["rows"] == 9
    left = {path.name for path in first.folder.iterdir()}
    names = {
        ".lock",
        "config.yaml",
        "run.json",
        "data_report.json",
        "metrics.jsonl",
        "times.jsonl",
        "report.md",
        "report.html",
        "tensorboard",
        "export",
    }
    assert left == names


def test_tensorboard_has_the_same_losses(first: Run) -> None:
    events = EventAccumulator(str(first.folder / "tensorboard")).Reload()
    for tag, key, records in (
        ("train/loss", "loss", first.steps),
        ("eval/loss", "eval_loss", first.evals),
    ):
        scalars = events.Scalars(tag)
        assert [s.step for s in scalars] == [r["step"] for r in records]
        assert [s.value for s in scalars] == pytest.approx([r[key] for r in records])


# Runs compared ----------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_digits(first: Run, sft) -> None:
    again = sft("again")
    assert len(first.losses()) == 2 * len(LOGGED) + 3
    assert again.losses() == first.losses()
    assert [r["batch_hash"] for r in again.steps] == [r["batch_hash"] for r in first.steps]


def test_another_seed_gives_other_batches(first: Run, sft) -> None:
    other = sft("other", "seed=43", "task.export_checkpoint_path=null")
    assert [r["step"] for r in other.steps] == LOGGED
    assert not {r["batch_hash"] for r in other.steps} & {r["batch_hash"] for r in first.steps}
    assert not (other.folder / "export").exists()
    assert other.compiled == 0  # no row and no seed is a constant of the graph


def test_an_epoch_sees_every_block_once(first: Run, sft) -> None:
    """The last batch is filled up with empty blocks, and how often is logged changes nothing."""
    epoch = sft(
        "epoch", "task.max_steps=null", "task.num_epochs=1", "logging_steps=1", "eval=none",
        "eval.file_dataset_path=null", "eval.every_steps=null", "task.export_checkpoint_path=null",
    )  # fmt: skip
    data = epoch.report()["dataset"]
    assert data["num_blocks"] % 4, "the rows should leave a partial batch"
    assert len(epoch.steps) == -(-data["num_blocks"] // 4)
    assert sum(r["real_tokens"] for r in epoch.steps) == data["real_tokens"]
    assert sum(r["supervised_tokens"] for r in epoch.steps) == data["supervised_tokens"]
    assert epoch.steps[-1]["epoch"] == 1
    assert len({r["batch_hash"] for r in epoch.steps}) == len(epoch.steps)
    assert {r["slot_tokens"] for r in epoch.steps} == {4 * 64}
    hashes = {r["step"]: r["batch_hash"] for r in epoch.steps}
    assert hashes[3] == first.steps[0]["batch_hash"]


# dry_run ----------------------------------------------------------------------------------------


def test_dry_run_tells_the_budget_without_weights(
    command, run, tiny: Path, rows, tmp_path: Path, monkeypatch, capsys, order_of
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    programs_kept_in: list[str | None] = []
    monkeypatch.setattr(xla_backend, "keep_compiled", programs_kept_in.append)
    folder = tmp_path / "bare"
    shutil.copytree(tiny, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    before, compiled = set(tmp_path.rglob("*")), compiles()
    argv = command(
        f"model.pretrained_model={folder}", "eval=file", f"eval.file_dataset_path={rows[1]}",
        "task.max_steps=null", "task.num_epochs=3", "run_name=mine", "dry_run=true",
    )  # fmt: skip
    assert run(argv) == 0
    # Prepared rows are kept for the run itself; nothing else is written.
    prepared = tmp_path / "cache/torchprime/prepared"
    assert len(list(prepared.iterdir())) == 3  # training rows, held-out rows, leaks
    written = set(tmp_path.rglob("*")) - before
    assert {path for path in written if prepared not in path.parents} == {
        prepared, prepared.parent, prepared.parent.parent,
    }  # fmt: skip
    assert programs_kept_in == [None]
    assert compiles() == compiled
    printed = capsys.readouterr().err
    order = order_of(argv)
    steps = order.steps_per_epoch
    batches = [order.batch(step) for step in range(steps)]
    empty = steps * 4 - order.data.num_blocks
    for line in (
        rf"steps +{3 * steps} \(3.00 epochs of {steps} steps",
        rf"blocks +{order.data.num_blocks} of 64 tokens, 4 per update, {empty} empty",
        r"slot +256 tokens per update",
        *(
            rf"{kind} +{sum(each) / steps:,.0f} on average \({min(each)} to {max(each)}\) tokens"
            for kind, each in (
                ("real", [b.real_tokens for b in batches]),
                ("supervised", [b.supervised_tokens for b in batches]),
            )
        ),
        rf"parameters +{LlamaForCausalLM.from_pretrained(tiny).num_parameters():,}",
        r"mesh +fsdp=2 x tensor=2",
        r"memory +about [\d.]+ GiB per device",
        r"held out +9 examples",
    ):
        assert re.search(line, printed), f"{line} is not in:\n{printed}"
    assert "dry_run=true" in printed


# The loop, without a device ---------------------------------------------------------------------


class FakeBackend:
    """Counts what it is asked for; `fail` maps a method's name to the call that raises."""

    name, device_kind, device_count, attention = "fake", "none", 1, "none"
    processes = OneProcess()

    def __init__(self, bad_step: int = 0, **fail: int) -> None:
        self.bad_step, self.fail = bad_step, fail
        self.calls: list[str] = []
        self.rates: list[float] = []
        self.compiled = 0

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.calls.count(name) == self.fail.get(name):
            raise RuntimeError(f"{name} fails")

    def put(self, batch: Batch, accumulation: int) -> Batch:
        self._call("put")
        return batch

    def train_step(self, batch: Batch, lr: float) -> int:
        self._call("train_step")
        self.rates.append(lr)
        return len(self.rates)

    def read(self, handle: int) -> StepNumbers:
        self._call(f"read {handle}")
        return StepNumbers(10.0 - handle, 1.0, 5.0, self.bad_step)

    def synchronize(self) -> None:
        """Waiting reads nothing."""

    def compiles(self) -> int:
        return self.compiled

    def device_memory_bytes(self) -> None:
        return None


class Keep(BaseHook):
    def __init__(self) -> None:
        self.records: list[StepRecord] = []
        self.finished: list[tuple[int, bool]] = []

    def on_record(self, record: StepRecord) -> None:
        self.records.append(record)

    def after_step(self, step: int, last: bool) -> None:
        self.finished.append((step, last))


def blocks(count: int = 7) -> PackedDataset:
    examples = [
        Example(
            f"r:{n}",
            np.arange(n, n + 5, dtype=np.int32),
            np.ones(5, dtype=np.float32),
            np.full(5, 5, dtype=np.uint8),
            "joint",
        )
        for n in range(count)
    ]
    return PackedDataset.from_examples(examples, block_size=8, pad_id=0, packing="none")


def loop(backend: Any, *, steps: int = 8, logging_steps: int = 3, data: Any = None) -> Keep:
    keep = Keep()
    TrainLoop(
        backend,
        DataOrder(data or blocks(), 0, 2),
        accumulation=1,
        learning_rate=lambda step: step / 100,
        logging_steps=logging_steps,
        flops_per_token=1.0,
        hooks=[keep],
        control=RunControl(CompileGuard(backend, allow=False), Stopwatch()),
    ).run(range(steps))
    return keep


def loader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "torchprime-loader"]


def test_device_is_read_at_logged_steps_only() -> None:
    backend = FakeBackend()
    keep = loop(backend)
    asked = [call for call in backend.calls if call != "put"]
    step = "train_step"
    assert asked == [step, step, step, "read 3", step, step, step, "read 6", step, step, "read 8"]
    assert [record.step for record in keep.records] == [3, 6, 8]
    assert [record.loss for record in keep.records] == [7.0, 4.0, 2.0]
    assert backend.rates == [n / 100 for n in range(8)]
    assert [record.lr for record in keep.records] == [0.02, 0.05, 0.07]
    assert keep.finished == [(n, n == 8) for n in range(1, 9)]
    assert backend.calls.count("put") == 8  # nothing is built that no step takes
    assert not loader_threads()


class BrokenBlocks:
    """Blocks of which the third batch cannot be built."""

    num_blocks = 100
    source_names = [""]

    def __init__(self) -> None:
        self.left, self.data = 2, blocks(100)

    def batch(self, indices: np.ndarray) -> Batch:
        if not self.left:
            raise OSError("the disk is gone")
        self.left -= 1
        return self.data.batch(indices)


def test_error_while_building_a_batch_surfaces() -> None:
    backend = FakeBackend()
    with pytest.raises(OSError, match="the disk is gone"):
        loop(backend, data=BrokenBlocks())
    assert not loader_threads()
    assert backend.calls.count("train_step") == 2  # the batches before it were used


def test_error_while_sending_a_batch_surfaces() -> None:
    with pytest.raises(RuntimeError, match="put fails"):
        loop(FakeBackend(put=4))
    assert not loader_threads()


def test_error_in_a_step_ends_the_loader() -> None:
    """Though the traceback still holds the loop's frame."""
    with pytest.raises(RuntimeError, match="train_step fails") as caught:
        loop(FakeBackend(train_step=3), steps=50)
    assert caught.tb is not None
    assert not loader_threads()


def test_divergence_names_the_first_bad_step_and_its_batch() -> None:
    backend = FakeBackend(bad_step=2)
    order = DataOrder(blocks(), 0, 2)
    with pytest.raises(DivergedError) as caught:
        loop(backend, steps=50)
    assert f"step 2 is not finite (batch {order.batch(1).hash()})" in str(caught.value)
    assert [c for c in backend.calls if c.startswith("read")] == ["read 3"]
    assert not loader_threads()


# The guard against recompiles -------------------------------------------------------------------


def run_guarded(
    compiled: list[int], inputs: list[Any], *, allow: bool = False, kind: str = "train step"
) -> None:
    """Run a kind of step once per entry, which is how often it compiles in that run."""
    backend: Any = FakeBackend()
    guard = CompileGuard(backend, allow=allow)
    for count, each in zip(compiled, inputs, strict=True):
        with guard.watch(kind, each):
            backend.compiled += count


SHAPES = (("input_ids", (4, 64), "int32"),)
OTHER = (("input_ids", (4, 65), "int32"),)


def test_two_runs_may_compile() -> None:
    run_guarded([1, 1, 0, 0], [SHAPES] * 4)


def test_third_compile_with_equal_shapes_names_a_constant() -> None:
    with pytest.raises(RecompileError) as caught:
        run_guarded([1, 0, 1], [SHAPES] * 3)
    message = str(caught.value)
    assert "train step compiled again in its run number 3" in message
    assert "shapes of the first run" in message and "constant" in message
    assert "allow_recompile=true" in message


def test_third_compile_with_other_shapes_names_both() -> None:
    with pytest.raises(RecompileError) as caught:
        run_guarded([1, 0, 1], [SHAPES, SHAPES, OTHER])
    assert f"inputs changed from {SHAPES} to {OTHER}" in str(caught.value)
    assert "constant" not in str(caught.value)


def test_recompiles_may_be_allowed() -> None:
    run_guarded([1, 0, 1, 2], [SHAPES, SHAPES, OTHER, SHAPES], allow=True)


def test_each_kind_of_step_has_its_own_two_runs() -> None:
    """A first evaluation after many steps compiles, and that is no mistake."""
    backend: Any = FakeBackend()
    guard = CompileGuard(backend, allow=False)
    for _ in range(5):
        with guard.watch("train step", SHAPES):
            pass
    with guard.watch("held-out step", SHAPES):
        backend.compiled += 1
    with pytest.raises(RecompileError, match="train step"), guard.watch("train step", SHAPES):
        backend.compiled += 1


def test_programs_are_counted_by_kind_of_step() -> None:
    backend: Any = FakeBackend()
    guard = CompileGuard(backend, allow=True)
    for kind, programs in (("train step", 1), ("held-out step", 2), ("train step", 1)):
        with guard.watch(kind, SHAPES):
            backend.compiled += programs
        with guard.watch(kind, SHAPES):
            time.sleep(0.2)  # compiles nothing
    programs = {kind: compiled.programs for kind, compiled in guard.compiled.items()}
    assert programs == {"train step": 2, "held-out step": 2}
    assert all(0 < compiled.seconds < 0.2 for compiled in guard.compiled.values())


def test_the_loop_is_guarded() -> None:
    class Recompiling(FakeBackend):
        def train_step(self, batch: Batch, lr: float) -> int:
            self.compiled += 1
            return super().train_step(batch, lr)

    backend = Recompiling()
    with pytest.raises(RecompileError, match="run number 3"):
        loop(backend)
    assert not loader_threads()


def test_nothing_compiles_after_the_first_steps(first: Run) -> None:
    """By the records' own counter, over three more steps with warm-up and an evaluation."""
    assert len({record["compiles"] for record in first.steps}) == 1
