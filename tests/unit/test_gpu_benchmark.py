"""The GPU benchmark's whole way on a tiny shape: both programs run, and its report is of them."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from load_script import load_script

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_sft.py"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="the other side is TRL")
def test_both_sides_run_and_are_told(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--tiny", "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu_sft.json").read_text())
    ours, trl = report["shapes"]["tiny"].values()
    for each in (ours, trl):
        # Half of GSM8K's tokens and of the shipped rows' are supervised, the same on both sides.
        share = each["supervised_tokens_per_s"] / each["slot_tokens_per_s"]
        assert 0.3 < share < 0.7 and each["step_seconds"] > 0 and each["peak_bytes"] > 2**28
        assert each["micro_batch"] == 2 and each["mfu"] is None
    shares = [e["supervised_tokens_per_s"] / e["slot_tokens_per_s"] for e in (ours, trl)]
    assert shares[0] == pytest.approx(shares[1], rel=0.1)
    # In seconds per step and blocks of tokens, both did the same amount of work.
    slots = [e["slot_tokens_per_s"] * e["step_seconds"] for e in (ours, trl)]
    assert slots[0] == pytest.approx(4 * 512, rel=0.01) and slots[1] == pytest.approx(2048, rel=0.1)
    assert "| tiny | ours | 2 |" in (tmp_path / "gpu_sft.md").read_text()
    assert report["summary"]["tiny"]["ratio"] > 0


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    sys.path.insert(0, str(BENCHMARK.parent))  # as for a script
    yield load_script(BENCHMARK)
    sys.path.remove(str(BENCHMARK.parent))


def test_the_largest_micro_batch_that_fits_is_taken(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def train(job: Any) -> dict[str, float]:
        tried.append((job.micro_batch, job.accumulation, job.out))
        if job.micro_batch > 2:
            raise benchmark.OutOfMemory
        return {"supervised_tokens_per_s": 1.0, "slot_tokens_per_s": 2.0}

    monkeypatch.setattr(benchmark, "ours", train)
    architecture = {**benchmark.TINY, "bos_token_id": 0, "eos_token_id": 1}
    case = benchmark.CASES["ours"]
    job = benchmark.Job("1b", architecture, case, "", "", "out", 2, 0, 32, 512, 10, "adamw")
    found = benchmark.measure(job, [8, 5, 4, 2, 1])
    assert found["micro_batch"] == 2 and found["mfu"] is None  # no GPU, no peak
    assert tried == [(8, 2, "out-8"), (4, 4, "out-4"), (2, 8, "out-2")]  # 5 does not divide
    assert benchmark.measure(job, [8, 4]) is None


def test_the_best_of_trl_counts_and_what_does_not_fit_is_told(benchmark: ModuleType) -> None:
    def row(rate: float, share: float | None) -> dict[str, Any]:
        facts = {"micro_batch": 4, "slot_tokens_per_s": 2 * rate, "mfu": share, "peak_bytes": 2**36}
        return {**facts, "supervised_tokens_per_s": rate, "step_seconds": 1.5, "attention": "flash",
                "loss": "liger"}  # fmt: skip

    results = {"ours": row(1300.0, 0.5), "ours, remat": None,
               "TRL, a": row(500.0, 0.2), "TRL, b": row(1000.0, 0.4)}  # fmt: skip
    assert benchmark.summary(results) == {"ratio": 1.3, "mfu": 0.5}
    assert benchmark.summary({"ours": None, "TRL, a": None}) == {"ratio": None, "mfu": None}
    machine = {"gpus": ["H"] * 8, "cpu": "", "date": "a day", "versions": {"torch": "2.9"}}
    report = {"machine": machine, "command": "c", "shapes": {"8b": results}, "summary": {}}
    report["summary"] = {"8b": benchmark.summary(results)}
    table = benchmark.markdown(report)
    assert "8 x H, a day; torch 2.9" in table and "| 8b | ours, remat | out of memory |" in table
    assert "| 8b | ours | 4 | 1,300 | 2,600 | 50.0% | 64.0 | 1.50 | flash, liger |" in table
    assert "| 8b | 1.30 | 1.3 | 50.0% | 50% |" in table


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARK), "--out", str(tmp_path)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and "there is no GPU here: --tiny" in done.stderr
    assert not list(tmp_path.iterdir())
