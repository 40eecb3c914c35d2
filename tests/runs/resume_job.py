"""One process of a group: a run without interruption, and the same with a kill and a resume.

python resume_job.py '{"whole": ARGV, "cut": ARGV, "killed_after": STEP, "poisoned": [STEP, ...]}'
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

os.environ["USE_TORCH_XLA"] = "0"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import pytest  # noqa: E402
from interrupted import Killed, kill_after, poison  # noqa: E402

from torchprime.config.entry import run_main  # noqa: E402
from torchprime.torch_native import runtime  # noqa: E402
from torchprime.torch_native.train import main  # noqa: E402
from torchprime.training.optim import adamw_8bit  # noqa: E402


def run(argv: list[str]) -> None:
    code = run_main(main, argv)
    assert code == 0, code


def job(whole: list[str], cut: list[str], killed_after: int, poisoned: list[int]) -> None:
    stop, runtime.stop_processes = runtime.stop_processes, lambda: None
    runtime.start_processes()  # one group for all runs
    # 8-bit state for a model of this size too
    adamw_8bit.SMALLEST = adamw_8bit.SMALLEST_BLOCK = 1
    with pytest.MonkeyPatch.context() as patch:
        poison(patch, poisoned)
        run(whole)
        kill_after(patch, killed_after)
        with pytest.raises(Killed):
            run(cut)
        run(cut)
    stop()


if __name__ == "__main__":
    job(**json.loads(sys.argv[1]))
