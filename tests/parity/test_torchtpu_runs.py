"""Whole runs with one program per chip, on TorchTPU's stand-in, beside the other backends.

`torchprime train device=tpu_on_cpu` runs in TorchTPU's environment, the others in this one. No TPU
takes part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

REPO = Path(__file__).resolve().parents[2]
PYTHON = Path(
    os.environ.get("TORCHPRIME_TORCHTPU_PYTHON") or REPO / ".venv-torchtpu" / "bin" / "python"
)
TRAIN = ["-m", "torchprime.cli.main", "train"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *TRAIN[:2]]
# A start of the quickstart, with everything that a run does.
SHAPE = [
    *("--config-name", "quickstart", "task.max_steps=6", "logging_steps=1", "metrics.trackers=[]"),
    *("dataset.block_size=128", "task.global_batch_size=8", "task.sample_prompts=0"),
    *("checkpoint.every_steps=3", "checkpoint.keep_last=null", "eval.every_steps=3"),
    *("eval.generate.max_examples=4", "eval.generate.max_new_tokens=16", "selection.gates=[]"),
]
MESH = ["ici_mesh.tensor=1", "ici_mesh.fsdp=2"]  # of the runs besides TorchTPU's

pytestmark = [
    pytest.mark.torchtpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run make test-torchtpu"),
]


class Done(NamedTuple):
    folder: Path
    output: str

    def records(self, field: str) -> dict[int, dict[str, Any]]:
        """The records that have a field, by step."""
        rows = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return {row["step"]: row for row in rows if row.get(field) is not None}

    def losses(self, first: int = 1) -> list[list[float]]:
        found = self.records("grad_norm")
        return [[found[n]["loss"], found[n]["grad_norm"]] for n in sorted(found) if n >= first]


def run(folder: Path, python: Path | str, words: list[str], *more: str) -> Done:
    ours = ("PJRT_", "CPU_NUM_", "JAX_", "XLA_")  # tests/conftest.py sets a number of devices, too
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1"}
    command = [str(python), *words, *SHAPE, f"output_dir={folder}", *more]
    done = subprocess.run(command, env=env, cwd=folder.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return Done(folder / "quickstart", done.stdout + done.stderr)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def ours(base: Path) -> Done:
    return run(base / "chips", PYTHON, TRAIN, "device=tpu_on_cpu")


@pytest.fixture(scope="module")
def native(base: Path) -> Done:
    return run(base / "native", sys.executable, [*TORCHRUN, "train"], *MESH)


@pytest.fixture(scope="module")
def xla(base: Path) -> Done:
    return run(base / "xla", sys.executable, TRAIN, "--backend", "xla", *MESH)


def test_a_run_equals_the_native_backends(ours: Done, native: Done) -> None:
    assert "backend native (torch.distributed): device=tpu_on_cpu" in ours.output
    assert "isolation    proved" in ours.output
    assert ours.losses() == [pytest.approx(each, rel=1e-5) for each in native.losses()]
    own, theirs = ours.records("eval_loss"), native.records("eval_loss")
    assert own.keys() == theirs.keys() == {0, 3, 6}
    for step, record in own.items():
        assert record["eval_loss"] == pytest.approx(theirs[step]["eval_loss"], rel=1e-5)
        assert record["scores"] == theirs[step]["scores"]


def test_compare_and_certificate_pass(ours: Done, native: Done) -> None:
    certificate = json.loads((ours.folder / "export" / "certificate.json").read_text())
    assert certificate["passed"]
    folders = [str(ours.folder), str(native.folder)]
    command = [sys.executable, "-m", "torchprime.cli.main", "compare", *folders]
    env = os.environ | {"PYTHONPATH": str(REPO)}
    done = subprocess.run(command, cwd=ours.folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def third(done: Done) -> str:
    return f"resume={done.folder / 'checkpoints' / 'step_00000003'}"


def test_a_resumed_run_has_the_same_bits(base: Path, ours: Done) -> None:
    again = run(base / "again", PYTHON, TRAIN, "device=tpu_on_cpu", third(ours))
    assert again.losses() == ours.losses(first=4)
    assert weights(again) == weights(ours)


def weights(done: Done) -> dict[str, bytes]:
    files = sorted((done.folder / "export").glob("*.safetensors"))
    assert files
    return {path.name: path.read_bytes() for path in files}


def test_a_checkpoint_of_xla_resumes_here_and_back(base: Path, ours: Done, xla: Done) -> None:
    here = run(base / "here", PYTHON, TRAIN, "device=tpu_on_cpu", third(xla))
    assert here.losses() == [pytest.approx(each, rel=1e-5) for each in xla.losses(first=4)]
    back = run(base / "back", sys.executable, TRAIN, "--backend", "xla", *MESH, third(ours))
    assert back.losses() == [pytest.approx(each, rel=1e-5) for each in ours.losses(first=4)]
