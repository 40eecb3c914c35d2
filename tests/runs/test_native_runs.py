"""Whole runs in two processes: the export and its proofs, and what is said when one is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from forks import Fork, ForkServer
from transformers import AutoModelForCausalLM

from torchprime.checkpoint.hf.read import SafetensorsReader
from torchprime.config.entry import run_main
from torchprime.torch_native.runtime import TIMEOUT_VARIABLE
from torchprime.torch_native.train import main

JOB = Path(__file__).parent / "job.py"
OVERRIDES = (
    "model=quickstart", "dataset=quickstart", "dataset.block_size=64",
    "dataset.max_rejected_fraction=1.0", "task=sft", "eval=quickstart", "eval.max_examples=20",
    "task.max_steps=4", "task.global_batch_size=4", "ici_mesh.fsdp=2", "logging_steps=1",
)  # fmt: skip


@contextmanager
def processes(
    server: ForkServer, mishap: str, out: Path, *more: str, **environment: str
) -> Iterator[list[Fork]]:
    """Two ranks without torchrun, which would end the one as soon as the other fails.

    Args:
        more: overrides of the config.
    """
    place = [f"output_dir={out}", "run_name=run"]
    ranks = server.group(2, JOB, mishap, *OVERRIDES, *place, *more, **environment)
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.kill()


def test_several_processes_prove_their_export(fork_server: ForkServer, tmp_path: Path) -> None:
    with processes(fork_server, "none", tmp_path) as (first, second):
        one, two = first.end(), second.end()
    assert (one.code, two.code) == (0, 0), one.printed + two.printed
    assert "logits of transformers match the trainer's" in one.printed
    assert "step 4/4" in one.printed and "step" not in two.printed
    export = tmp_path / "run" / "export"
    model = AutoModelForCausalLM.from_pretrained(export)
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert sum(p.numel() for p in model.parameters()) == facts["model"]["parameters"]


@pytest.mark.slow
@pytest.mark.parametrize("axis", ["fsdp", "tensor"])
def test_new_tokens_in_two_processes_as_in_one(
    axis: str, fork_server: ForkServer, tmp_path: Path
) -> None:
    sizes = [f"ici_mesh.{each}={1 + (each == axis)}" for each in ("fsdp", "tensor")]
    tokens = [
        'model.add_special_tokens=["Answer:","</answer>"]',
        "task.optimizer.learning_rate=1e-3",
    ]
    with processes(fork_server, "none", tmp_path / "two", *tokens, *sizes) as (first, second):
        one, two = first.end(), second.end()
    assert (one.code, two.code) == (0, 0), one.printed + two.printed
    assert one.printed.count("new tokens   'Answer:' 512") == 1 and "new tokens" not in two.printed
    place = [f"output_dir={tmp_path / 'one'}", "run_name=run", "ici_mesh.fsdp=1"]
    assert run_main(main, [*OVERRIDES, *tokens, *place]) == 0
    runs = [tmp_path / name / "run" for name in ("one", "two")]
    alone, together = (
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in runs
    )
    for mine, theirs in zip(alone, together, strict=True):
        for number in ("loss", "grad_norm", "eval_loss"):
            assert mine.get(number, 0) == pytest.approx(theirs.get(number, 0), rel=1e-5)
    weights = [SafetensorsReader(run / "export").get("model.embed_tokens.weight") for run in runs]
    assert weights[0].shape == (640, 160)
    torch.testing.assert_close(*weights, rtol=1e-4, atol=1e-5)


def test_hosts_with_disks_of_their_own_are_refused_before_the_first_step(
    fork_server: ForkServer, tmp_path: Path
) -> None:
    with processes(fork_server, "own-disk", tmp_path, "checkpoint.every_steps=2") as (
        first,
        second,
    ):
        one, two = first.end(), second.end()
    assert not list(tmp_path.iterdir()), "a run's folder was made, or a mark is left"
    for process in (one, two):
        assert process.code == 2 and "Traceback" not in process.printed, process.printed
        assert "error: checkpoint.folder: every process must see" in process.printed
        assert "process 1 says: it is not there (1 of 2 processes)" in process.printed


def test_a_failed_export_keeps_nobody_waiting(fork_server: ForkServer, tmp_path: Path) -> None:
    with processes(fork_server, "full-disk", tmp_path) as (first, second):
        one, two = first.end(), second.end()
    assert one.code == 2 and "error: no space left" in one.printed
    assert two.code == 0, two.printed


@pytest.mark.slow
def test_the_gsm8k_run_takes_the_named_config_and_the_machines_mesh(tmp_path: Path) -> None:
    repo = JOB.parents[2]
    script = repo / "experimental" / "torchrun_gpu_sft" / "run_sft_gsm8k.py"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    # No weights and rows of the hub: the rest is the named config's.
    base = repo / "torchprime" / "assets" / "quickstart" / "base"
    given = [f"model.pretrained_model={base}", "dataset=quickstart", "eval=none"]
    given += [f"output_dir={tmp_path}", "dataset.block_size=256"]
    done = subprocess.run(
        [*launch, str(script), *given, "dry_run=true", "torch_dtype=float32"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "mesh         fsdp=2" in done.stderr and "64 per update" in done.stderr
    assert done.stderr.count("steps        60") == 1  # one process speaks
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mishap", [pytest.param("die", marks=pytest.mark.slow), "hang"])
def test_a_lost_process_ends_the_others_with_a_message(
    mishap: str, fork_server: ForkServer, tmp_path: Path
) -> None:
    with processes(fork_server, mishap, tmp_path, **{TIMEOUT_VARIABLE: "15"}) as (first, _):
        one = first.end()
    assert one.code == 2, one.printed
    message = one.printed.split("error: ")[-1]
    assert message.startswith("rank 0 of 2: the processes cannot talk to each other")
    assert "NCCL_P2P_DISABLE=1" in message and "Traceback" not in one.printed
    assert "step 2/4" in one.printed and "step 3/4" not in one.printed
