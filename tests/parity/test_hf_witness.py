"""The witness (transformers' model and Trainer) against our job, and that the witness is right.

Both are run as a user would, each in a process of its own: the shipped quickstart model on its
rows, packed, with row weights, two micro-batches per update, and an epoch whose last update is
partly empty. What the witness is made of is then checked alone: its loss of packed blocks against
the examples one by one, its order of blocks, its schedules and what it refuses.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from forks import ForkServer
from load_script import load_script
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    get_scheduler,
)

from torchprime.config.compose import compose_config
from torchprime.config.schema import TrainConfig
from torchprime.config.sections.loss import LossConfig
from torchprime.data.blocks.batch import Batch
from torchprime.data.tokenizer.load import load_tokenizer
from torchprime.errors import ConfigError, RuntimeSetupError, UserError
from torchprime.losses.chunks import Projection
from torchprime.losses.cross_entropy import chunked_cross_entropy
from torchprime.losses.token_loss import TokenLoss
from torchprime.metrics.writers import read_metrics
from torchprime.models.layer_kinds import LayerKind
from torchprime.training.loop import DataOrder
from torchprime.training.optim.schedules import Schedule
from torchprime.training.setup.datasets import prepare_run_data
from torchprime.training.setup.model_files import pretrained_tensors

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate"
)

REPO = Path(__file__).resolve().parents[2]
WITNESS = REPO / "experimental" / "torchrun_gpu_sft" / "hf_witness.py"
XLA_JOB = REPO / "torchprime" / "torch_xla_models" / "train.py"
NATIVE_JOB = REPO / "torchprime" / "torch_native" / "train.py"
SHIPPED_ROWS = REPO / "torchprime" / "assets" / "quickstart" / "data" / "train.jsonl"
ROWS, BATCH, STEPS, WARMUP = 120, 8, 7, 2
OTHER_OPTIONS = (
    "task.max_steps=null",
    "task.num_epochs=1.4",
    "task.gradient_accumulation_steps=1",
    "task.max_grad_norm=null",
    "task.optimizer.weight_decay=0.1",
    "task.optimizer.betas=[0.9,0.95]",
    "task.lr_scheduler.name=linear",
    "task.lr_scheduler.min_lr_ratio=0.1",
    "task.lr_scheduler.warmup_steps=null",
    "task.lr_scheduler.warmup_ratio=0.2",
    "model.attention_kernel=reference",
    "remat=full",
    "logging_steps=2",
)

CAPPED: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    query_pre_attn_scalar=24,
    attn_logit_softcapping=0.5,
    final_logit_softcapping=1.5,
    bos_token_id=None,
    pad_token_id=None,
)

Records = list[dict[str, Any]]


@pytest.fixture(scope="module")
def argv(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command line of both jobs."""
    folder = tmp_path_factory.mktemp("witness")
    rows = [json.loads(line) for line in SHIPPED_ROWS.read_text().splitlines()[:ROWS]]
    for number, row in enumerate(rows):
        row["weight"] = (1, 0.5, 2)[number % 3]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    overrides = {
        "mesh": "single",
        "eval": "none",
        "dataset.file_dataset_path": path,
        "task.export_checkpoint_path": "null",
        "task.sample_prompts": 0,
        "task.global_batch_size": BATCH,
        "task.gradient_accumulation_steps": 2,
        "task.max_steps": STEPS,
        "task.lr_scheduler.warmup_steps": WARMUP,
        "logging_steps": 1,
        "isolation_probe": "false",  # one compile less
        "output_dir": folder / "runs",
    }
    return ["--config-name", "quickstart", *(f"{key}={value}" for key, value in overrides.items())]


@pytest.fixture(scope="module")
def run(argv: list[str]) -> Callable[..., Path]:
    """Run a script, by python or torchrun, with these overrides on top; the run's folder."""

    def go(script: Path, name: str, *overrides: str, launcher: tuple[str, ...] = ()) -> Path:
        command = [sys.executable, *launcher, str(script), *argv, *overrides, f"run_name={name}"]
        # One thread: OpenMP's threads spin while they wait, which a busy machine makes minutes of.
        environment = os.environ | {"CPU_NUM_DEVICES": "1", "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(
            command, env=environment, stderr=subprocess.PIPE, text=True, cwd=REPO
        ) as process:
            try:
                _, printed = process.communicate(timeout=250)
            except BaseException:
                process.terminate()  # torchrun ends its workers then; killed, it leaves them
                raise
        assert process.returncode == 0, printed
        return Path(argv[-1].removeprefix("output_dir=")) / name

    return go


@pytest.fixture(scope="module")
def witnessed(run: Callable[..., Path]) -> Path:
    """The witness' run."""
    return run(WITNESS, "witness")


@pytest.fixture(scope="module")
def witness() -> Iterator[ModuleType]:
    """The script as a module. It turns XLA off in its process, which is not to be done to ours."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("USE_TORCH_XLA", "1")  # put back on leaving, whatever the script makes of it
        module = load_script(WITNESS)
    yield module


@pytest.fixture(scope="module")
def config(argv: list[str]) -> TrainConfig:
    return compose_config(argv)


@pytest.fixture(scope="module")
def order(config: TrainConfig) -> DataOrder:
    """The batches both jobs saw."""
    tokenizer = load_tokenizer(Path(str(config.model.pretrained_model)))
    data = prepare_run_data(config, tokenizer, None, lambda _: None).train
    return DataOrder(data, config.seed, BATCH)


def steps_of(folder: Path) -> Records:
    return [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "train"]


def assert_agree(ours: Records, theirs: Records) -> None:
    """The same batches, and the same numbers as far as fp32 goes."""
    assert [r["step"] for r in ours] == [r["step"] for r in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for name in ("batch_hash", "supervised_tokens", "real_tokens", "slot_tokens", "epoch"):
            assert our[name] == their[name], (name, our, their)
        assert their["loss"] == pytest.approx(our["loss"], rel=1e-5)
        assert their["grad_norm"] == pytest.approx(our["grad_norm"], rel=1e-4)
        assert their["lr"] == pytest.approx(our["lr"], rel=1e-9, abs=0)


# Whole runs ---------------------------------------------------------------------------------------


@pytest.fixture(params=["native", pytest.param("xla", marks=pytest.mark.slow)])
def job(
    request: pytest.FixtureRequest,
    run: Callable[..., Path],
    argv: list[str],
    fork_server: ForkServer,
) -> Path:
    """Our run on a backend; that both are one training, `test_from_xla_to_native_and_back` has."""
    if request.param == "xla":
        return run(XLA_JOB, "xla")
    ended = fork_server.start(NATIVE_JOB, *argv, "run_name=native").end(250)
    assert ended.code == 0, ended.printed
    return Path(argv[-1].removeprefix("output_dir=")) / "native"


def test_our_job_and_the_witness_agree(job: Path, witnessed: Path, order: DataOrder) -> None:
    ours, theirs = steps_of(job), steps_of(witnessed)
    assert_agree(ours, theirs)
    # And there was something to agree on: it learned, with a warm-up, and over a partial update.
    assert [r["step"] for r in theirs] == list(range(1, STEPS + 1))
    assert theirs[0]["lr"] == 0 and theirs[-1]["loss"] < 0.6 * theirs[0]["loss"]
    assert order.steps_per_epoch < STEPS and order.data.num_blocks % BATCH
    weights = order.batch(0).loss_weights
    assert {0.5, 1.0, 2.0} <= set(weights.flatten().tolist())


# An adapter with most options at once.
ADAPTED = (
    "adapter=dora",
    "adapter.base_dtype=int8",
    "adapter.scaling=rslora",
    "adapter.modules_to_train=[model.norm]",
    "task.optimizer.learning_rate=2e-3",
    "task.optimizer.weight_decay=0.1",
    "task.max_steps=3",
    "task.lr_scheduler.warmup_steps=0",
    "task.lr_scheduler.name=constant",
)


@pytest.fixture(scope="module")
def adapted(argv: list[str], fork_server: ForkServer) -> Path:
    """Our run with an adapter."""
    ended = fork_server.start(NATIVE_JOB, *argv, *ADAPTED, "run_name=adapted").end(250)
    assert ended.code == 0, ended.printed
    return Path(argv[-1].removeprefix("output_dir=")) / "adapted"


def test_an_adapter_trains_as_in_peft(
    adapted: Path, witness: ModuleType, argv: list[str], order: DataOrder
) -> None:
    """By the witness' model and loss, and torch's clipping and optimizer."""
    pytest.importorskip("peft")
    c = compose_config([*argv, *ADAPTED])
    files = witness.files_of(c, weights=True)
    model = witness.load_model(files.folder, torch.float32, "sdpa")
    model = witness.adapted(model, files, torch.float32, c.seed)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rate, decay = c.task.optimizer.learning_rate, c.task.optimizer.weight_decay
    groups = [
        {"params": [p for n, p in trained.items() if ".norm." not in n], "weight_decay": decay},
        {"params": [p for n, p in trained.items() if ".norm." in n], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    ours, blocks = steps_of(adapted), witness.OrderedBlocks(order, STEPS)
    for step, record in enumerate(ours):
        inputs = witness.collate([blocks[place] for place in places(step)])
        mask = witness.segment_mask(inputs.pop("segment_ids"))
        labels = inputs.pop("labels")
        outputs = model(**inputs, attention_mask=mask)
        loss = witness.weighted_loss(outputs, labels, labels["weights"].sum())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(list(trained.values()), c.task.max_grad_norm or 1e9)
        optimizer.step()
        assert record["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert len(ours) == 3 and ours[-1]["loss"] < 0.9 * ours[0]["loss"]


def places(step: int) -> range:
    """The numbers of an update's blocks."""
    return range(step * BATCH, (step + 1) * BATCH)


@pytest.mark.slow
def test_an_adapter_trains_as_in_peft_by_trainer(run: Callable[..., Path], adapted: Path) -> None:
    assert_agree(steps_of(adapted), steps_of(run(WITNESS, "witness-adapted", *ADAPTED)))


@pytest.mark.slow
def test_they_agree_with_other_options(run: Callable[..., Path]) -> None:
    """Another schedule and length, no clipping, weight decay, eager attention, recomputation."""
    ours = steps_of(run(XLA_JOB, "xla-other", *OTHER_OPTIONS))
    theirs = steps_of(run(WITNESS, "witness-other", *OTHER_OPTIONS))
    assert len(ours) > 2 and ours[-1]["step"] % 2  # the last is logged, whatever logging_steps is
    assert_agree(ours, theirs)


@pytest.mark.slow
def test_they_agree_on_a_model_with_soft_caps(
    run: Callable[..., Path], argv: list[str], config: TrainConfig, tmp_path: Path
) -> None:
    """Caps that bend most scores and logits; the window is that of a block."""
    base = Path(str(config.model.pretrained_model))
    shutil.copytree(base, tmp_path / "gemma2")
    own = json.loads((base / "config.json").read_text())
    sizes = CAPPED | {key: own[key] for key in ("vocab_size", "eos_token_id")}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, sliding_window=config.dataset.block_size))
    for parameter in model.parameters():
        parameter.data.normal_(0.0, 0.3)
    model.save_pretrained(tmp_path / "gemma2")
    given = f"model.pretrained_model={tmp_path / 'gemma2'}"
    theirs = run(WITNESS, "capped-witness", given)
    assert json.loads((theirs / "run.json").read_text())["attention"] == "eager"
    assert_agree(steps_of(run(NATIVE_JOB, "capped", given)), steps_of(theirs))


@pytest.mark.slow
def test_two_processes_compute_what_one_does(run: Callable[..., Path], witnessed: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    both = run(WITNESS, "witness-2", launcher=launcher)
    assert_agree(steps_of(witnessed), steps_of(both))
    facts = json.loads((both / "run.json").read_text())
    assert facts["processes"] == facts["device"]["count"] == facts["mesh"]["data"] == 2


def test_the_folder_has_what_a_run_of_ours_has(witnessed: Path, config: TrainConfig) -> None:
    names = {path.name for path in witnessed.iterdir()}
    expected = {"config.yaml", "data_report.json", "metrics.jsonl", "run.json", "tensorboard"}
    assert names == expected
    facts = json.loads((witnessed / "run.json").read_text())
    assert facts["backend"] == "transformers" and facts["device"] == {"kind": "CPU", "count": 1}
    assert facts["model"]["dtype"] == "float32" and facts["model"]["parameters"] == 1_189_280
    assert facts["fingerprints"]["data"] and facts["plan"]["total_steps"] == STEPS
    kept = compose_config(["--config-dir", str(witnessed), "--config-name", "config"])
    assert kept == replace(config, run_name="witness")


# The witness's numbers ----------------------------------------------------------------------------


def loss_one_by_one(model: Any, batch: Batch) -> float:
    """Each segment alone in plain transformers: no packing, no positions, no mask."""
    total = 0.0
    for row, segments in enumerate(batch.segment_ids):
        for segment in range(1, int(segments.max()) + 1):
            here = (row, segments == segment)
            with torch.no_grad():
                logits = model(torch.from_numpy(batch.input_ids[here]).long()[None]).logits[0]
            targets = torch.from_numpy(batch.targets[here]).long()
            each = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
            total += float((each.double() * torch.from_numpy(batch.loss_weights[here])).sum())
    return total / batch.weight_sum


@pytest.fixture(scope="module")
def alone(config: TrainConfig, order: DataOrder) -> float:
    """The first batch's loss before training, example by example."""
    folder = str(config.model.pretrained_model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return loss_one_by_one(model.eval(), order.batch(0))


def test_the_first_loss_is_that_of_the_examples_alone(witnessed: Path, alone: float) -> None:
    assert steps_of(witnessed)[0]["loss"] == pytest.approx(alone, rel=1e-5)


def test_bf16_weights_move_by_their_fp32_copies(witness: ModuleType) -> None:
    """A step of 1e-3 is less than half of what a bf16 weight of 1 can take."""
    weight = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    optimizer = witness.MasterAdamW([{"params": [weight], "weight_decay": 0.0}], lr=1e-3)
    wide = torch.nn.Parameter(torch.ones(3))
    reference = torch.optim.AdamW([wide], lr=1e-3, weight_decay=0.0)
    for step in range(40):
        gradient = torch.tensor([1.0, 0.5, -2.0]) * (1 + step % 3)
        weight.grad, wide.grad = gradient.bfloat16(), gradient.bfloat16().float()
        optimizer.step()
        reference.step()
        assert torch.equal(weight, wide.bfloat16())
    assert (weight - 1).abs().min() > 0.03


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_mask_keeps_segments_apart(
    witness: ModuleType, config: TrainConfig, order: DataOrder, alone: float, attention: str
) -> None:
    model = witness.load_model(config.model.pretrained_model, torch.float32, attention).eval()
    blocks = witness.OrderedBlocks(order, total_steps=1)
    inputs = witness.collate([blocks[place] for place in range(BATCH)])
    mask = witness.segment_mask(inputs["segment_ids"])
    assert int(inputs["segment_ids"].max()) > 2  # the first batch is packed

    def loss(mask: torch.Tensor) -> float:
        shown = witness.additive(mask) if attention == "eager" else mask
        with torch.no_grad():
            outputs = model(
                input_ids=inputs["input_ids"],
                position_ids=inputs["position_ids"],
                attention_mask=shown,
            )
        weight = inputs["labels"]["weights"].sum()
        return float(witness.weighted_loss(outputs, inputs["labels"], weight))

    assert loss(mask) == pytest.approx(alone, rel=1e-5)
    causal = torch.ones_like(mask).tril()
    assert abs(loss(causal) - alone) > 1e-3 * alone


@pytest.mark.parametrize(
    "loss",
    [
        LossConfig(),
        LossConfig(label_smoothing=0.1),
        LossConfig(dft=True),
        LossConfig(label_smoothing=0.2, z_loss=1e-2),
        LossConfig(dft=True, z_loss=1e-2),
    ],
    ids=LossConfig.describe,
)
def test_its_variants_of_the_loss_are_ours(witness: ModuleType, loss: LossConfig) -> None:
    """Two computations: torch's functions on all logits, and ours in chunks."""
    torch.manual_seed(0)
    logits, weights = torch.randn(2, 7, 11) * 2, torch.rand(2, 7)
    targets = torch.randint(0, 11, (2, 7))
    targets[0, :3] = -100
    weights[0, :3] = 0
    kind = TokenLoss(loss.label_smoothing, loss.z_loss, loss.dft)
    theirs, ours = (logits.clone().requires_grad_() for _ in range(2))
    labels = {"targets": targets, "weights": weights}
    witness.weighted_loss(
        SimpleNamespace(logits=theirs), labels, torch.tensor(3.0), loss
    ).backward()
    sums = chunked_cross_entropy(ours, Projection(torch.eye(11)), targets, weights, 3, kind=kind)
    (sums.loss_sum / 3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_its_average_over_examples(witness: ModuleType) -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [1, 1, 2, 3, 3, 3]])
    weights = torch.tensor([[0, 1, 1, 0, 1, 0], [1, 1, 0, 0, 2, 1.0]])
    found = witness.over_examples(weights, segments).tolist()
    third = torch.tensor([2 / 3, 1 / 3]).tolist()
    assert found == [[0, 0.5, 0.5, 0, 1, 0], [0.5, 0.5, 0, 0, *third]]


def test_mask_of_a_small_block(witness: ModuleType) -> None:
    rows = witness.segment_mask(torch.tensor([[1, 1, 2, 0, 0]]))[0, 0].int().tolist()
    assert rows == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 0, 1, 0],  # padding sees padding
        [0, 0, 0, 1, 1],
    ]


def test_blocks_come_in_the_order_of_the_updates(witness: ModuleType, order: DataOrder) -> None:
    blocks = witness.OrderedBlocks(order, STEPS)
    assert len(blocks) == STEPS * BATCH
    for step in range(STEPS):
        rows = [blocks[step * BATCH + row] for row in range(BATCH)]
        again = {name: torch.stack([row[name] for row in rows]).numpy() for name in rows[0]}
        assert Batch(**again).hash() == order.batch(step).hash()


SCHEDULES = [
    (name, ratio, warmup)
    for name in ("linear", "cosine", "constant")
    for ratio in (0.0, 0.1, 1.0)
    for warmup in (0, 3, 10)
]


@pytest.mark.parametrize(("name", "ratio", "warmup"), SCHEDULES)
def test_every_schedule_has_its_name_in_transformers(
    witness: ModuleType, config: TrainConfig, name: str, ratio: float, warmup: int
) -> None:
    total, peak = 10, 3e-4
    scheduler = replace(config.task.lr_scheduler, name=name, min_lr_ratio=ratio)
    optimizer = replace(config.task.optimizer, learning_rate=peak)
    c = replace(config, task=replace(config.task, lr_scheduler=scheduler, optimizer=optimizer))
    given = witness.schedule_arguments(c, total_steps=total, warmup_steps=warmup)
    adamw = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=given["learning_rate"])
    theirs = get_scheduler(
        given["lr_scheduler_type"],
        adamw,
        num_warmup_steps=given["warmup_steps"],
        num_training_steps=total,
        scheduler_specific_kwargs=given["lr_scheduler_kwargs"],
    )
    ours = Schedule(name, peak, total, warmup_steps=warmup, min_lr_ratio=ratio).rate
    for step in range(total):
        assert adamw.param_groups[0]["lr"] == pytest.approx(ours(step), rel=1e-9, abs=1e-20)
        adamw.step()
        theirs.step()


@pytest.mark.parametrize(
    ("override", "processes", "message"),
    [
        ("task.optimizer.name=adafactor", 1, "task.optimizer.name"),
        ("task.max_grad_value=1.0", 1, "task.max_grad_value"),
        ("task.global_batch_size=10", 4, "a multiple of 8 = 4 processes"),
        ("task.optimizer.master_weights=false", 1, "task.optimizer.master_weights"),
        ("adapter.dropout=0.1", 1, "adapter.dropout: given 0.1, expected 0"),
        ("task.neftune_noise_alpha=5", 1, "task.neftune_noise_alpha: given 5.0, expected null"),
        (
            "task.loss.average=examples dataset.packing=wrapped",
            1,
            "dataset.packing: given 'wrapped', expected none or bfd",
        ),
    ],
)
def test_what_trainer_does_otherwise_is_refused(
    witness: ModuleType, argv: list[str], override: str, processes: int, message: str
) -> None:
    dtype = "bfloat16" if "master" in override else "float32"
    adapter = ["adapter=lora"] if "adapter" in override else []
    c = compose_config([*argv, *adapter, *override.split(), f"torch_dtype={dtype}"])
    with pytest.raises(ConfigError, match=message):
        witness.check_supported(c, processes)


def test_several_gpus_need_torchrun(
    witness: ModuleType, config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    witness.check_supported(config, 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RuntimeSetupError, match="torchrun"):
        witness.check_supported(config, 1)
    witness.check_supported(config, 2)


def test_new_rows_are_those_of_our_run(witness: ModuleType, argv: list[str]) -> None:
    c = compose_config([*argv, 'model.add_special_tokens=["<answer>"]'])
    files = witness.files_of(c, weights=True)
    model = witness.load_model(files.folder, torch.float32, "eager")
    before = model.get_input_embeddings().weight.detach().clone()
    witness.resize(model, files, torch.float32)
    after = model.get_output_embeddings().weight.detach()  # tied
    assert model.config.vocab_size == len(after) == 640
    assert torch.equal(after[:512], before)
    ours = pretrained_tensors(files, torch.float32)("model.embed_tokens.weight")
    assert torch.equal(after, ours) and after[512:].any()


def test_a_window_smaller_than_a_block_is_refused(witness: ModuleType, config: TrainConfig) -> None:
    files = witness.files_of(config, weights=False)
    layers = (LayerKind(), LayerKind(64))
    windowed = replace(files, architecture=replace(files.architecture, layers=layers))
    witness.check_windows(windowed, 64)
    with pytest.raises(UserError, match="sliding window"):
        witness.check_windows(windowed, 65)
