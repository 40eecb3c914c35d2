"""-m for real: runs whose processes cannot be shared, on both backends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SMALL = (
    "task.max_steps=2", "eval=none", "task.sample_prompts=0", "dataset.block_size=64",
    "dataset.max_rejected_fraction=1.0", "task.global_batch_size=4", "isolation_probe=false",
    "task.export_checkpoint_path=null", "task.lr_scheduler.warmup_steps=1", "logging_steps=1",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "swept"),
    [
        ("torch_xla_models.train", "mesh=single,fsdp4"),
        ("torch_native.train", "mesh=single seed=1,2"),
        ("cli.main train --backend native", "mesh=single seed=1,2"),
    ],
)
def test_each_run_of_a_sweep_is_complete(program: str, swept: str, tmp_path: Path) -> None:
    inherited = ("WORLD_SIZE", "CPU_NUM_DEVICES", "PJRT_NPROC")
    module, *flags = program.split()
    done = subprocess.run(
        [sys.executable, "-m", f"torchprime.{module}", *flags, "-cn", "quickstart", *SMALL,
         f"output_dir={tmp_path}", "-m", *swept.split()],
        env={k: v for k, v in os.environ.items() if k not in inherited},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    runs = [tmp_path / f"quickstart_{number}" for number in range(2)]
    assert done.stderr.count(": exit code 0 ") == 2
    for run in runs:
        lines = (run / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [1, 2]
        command = json.loads((run / "run.json").read_text())["command"]
        assert " -m " not in command.replace(f"-m torchprime.{module}", "")
        assert f"run_name={run.name}" in command
    if "fsdp4" in swept:
        devices = [json.loads((run / "run.json").read_text())["device"]["count"] for run in runs]
        assert devices == [1, 4]
