"""Losses that every version must give again: the quickstart's and the parity experiment's.

README.md beside this says where the numbers come from and how the tolerance was measured.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest
from load_script import load_script

from torchprime.config.entry import run_main
from torchprime.torch_native.train import main as native

HERE = Path(__file__).parent
FIRST = 10
# Measured: README.md.
RELATIVE_FIRST, RELATIVE = 1e-5, 1e-4


@pytest.fixture(scope="module")
def golden() -> ModuleType:
    return load_script(HERE / "write.py")


def test_the_first_losses_of_the_quickstart(golden: ModuleType, tmp_path: Path) -> None:
    # The learning rate of the first ten steps, its warm-up, does not depend on the length.
    argv = [
        "--config-name", "quickstart", "mesh=single", "eval=none", "selection.gates=[]",
        "selection.ranking=[eval_loss asc]", "export.which=last", "task.sample_prompts=0",
        "task.export_checkpoint_path=null", f"task.max_steps={FIRST + 1}", "logging_steps=1",
        "isolation_probe=false", f"output_dir={tmp_path}", "run_name=first",
    ]  # fmt: skip
    assert run_main(native, argv) == 0
    ours = golden.losses_of(tmp_path / "first" / "metrics.jsonl")[:FIRST]
    assert ours == pytest.approx(golden.read(golden.QUICKSTART)[:FIRST], rel=RELATIVE_FIRST)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_losses_of_the_quickstart(golden: ModuleType, tmp_path: Path) -> None:
    ours = golden.losses_of(golden.run_quickstart(tmp_path))
    assert len(ours) == 150
    assert ours == pytest.approx(golden.read(golden.QUICKSTART), rel=RELATIVE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_losses_of_the_parity_experiment(golden: ModuleType, tmp_path: Path) -> None:
    ours = golden.losses_of(golden.run_parity(tmp_path))
    assert len(ours) == golden.PARITY_STEPS
    assert ours == pytest.approx(golden.read(golden.PARITY), rel=RELATIVE)
