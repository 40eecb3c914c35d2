"""Runs that follow in the process of another, and the message of one that failed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from torchprime.config.compose import compose_config
from torchprime.sweep.jobs import SweepJob
from torchprime.sweep.process import RunProcesses, same_step

# A program that runs as an entry point does, with XLA imported or not.
PROGRAM = """
import os, signal, sys
from types import ModuleType
from torchprime.config.entry import run_main
from torchprime.errors import DataError

def main(config):
    if config.seed != 7:
        sys.modules["torch_xla"] = ModuleType("torch_xla")
    print("noise", config.seed, file=sys.stderr)
    if config.seed == 3:
        raise DataError("rows: none\\nof two lines")
    if config.seed == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if config.seed == 5:
        raise RuntimeError("a bug")
    with open(f"{config.output_dir}/{config.seed}", "w") as file:
        file.write(f"{os.getpid()} {' '.join(sys.argv[1:])}")
    return 0

sys.exit(run_main(main))
"""


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ("task.optimizer.learning_rate=1", True),
        ("seed=9", True),
        ("eval.every_steps=9", True),
        ("task.lr_scheduler.warmup_steps=1", True),
        ("dataset.block_size=64", False),
        ("task.global_batch_size=8", False),
        ("adapter=lora", False),
        ("mesh=single", False),
        ("torch_dtype=bfloat16", False),
        ("task.optimizer.name=lion", False),
        ("remat=full", False),
    ],
)
def test_what_shapes_the_step(change: str, same: bool) -> None:
    one = compose_config(["-cn", "quickstart"])
    assert same_step(one, compose_config(["-cn", "quickstart", change])) == same


def test_runs_follow_in_one_process_until_one_fails(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    processes = RunProcesses([sys.executable, str(program)])

    def run(seed: int, *more: str) -> tuple[int, str]:
        argv = ["-cn", "quickstart", f"seed={seed}", f"output_dir={tmp_path}", *more]
        job = SweepJob(f"{seed}", {"seed": str(seed)}, argv, compose_config(argv))
        ended = processes.run(job, tmp_path / f"{seed}.log")
        assert not ended.stopped
        return ended.code, ended.message

    assert [run(1), run(2)] == [(0, "")] * 2
    assert run(3) == (2, "rows: none of two lines")
    assert run(4) == (137, "the process ended by SIGKILL. noise 4")
    assert run(5) == (1, "RuntimeError: a bug")
    assert [run(6), run(7), run(8, "mesh=single"), run(9)] == [(0, "")] * 4
    processes.close()
    pids = {}
    for seed in (1, 2, 6, 7, 8, 9):
        pid, *argv = (tmp_path / f"{seed}").read_text().split()
        pids[seed] = pid
        assert argv[:3] == ["-cn", "quickstart", f"seed={seed}"]
        assert (tmp_path / f"{seed}.log").read_text() == f"noise {seed}\n"
    assert pids[1] == pids[2] and pids[6] == pids[7]  # 7 begins in a process with XLA
    assert len({pids[1], pids[6], pids[8], pids[9]}) == 4  # other mesh, then another again
    assert str(os.getpid()) not in pids.values()
