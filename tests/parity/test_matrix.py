"""A reduced parity matrix: XLA, torch.distributed and the witness train alike, in fp32 and in bf16.

`make parity` and `make noise` run the whole of it. What is compared here was trained by the same
programs, each started as a user would.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from load_script import load_script

from torchprime.compare.verdict import AGREE, DIFFER

SCRIPT = Path(__file__).resolve().parents[2] / "experimental" / "parity_matrix" / "run.py"
BF16_STEPS = 16

pytestmark = [
    pytest.mark.timeout(900),  # ten programs one after the other
    pytest.mark.skipif(
        importlib.util.find_spec("accelerate") is None,
        reason="transformers' Trainer needs accelerate",
    ),
]


@pytest.fixture(scope="module")
def matrix() -> ModuleType:
    return load_script(SCRIPT)


def change(metrics: Path, step: int, factor: float) -> None:
    """Multiply one step's loss in a finished run."""
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    for record in records:
        if record["kind"] == "train" and record["step"] == step:
            record["loss"] *= factor
    metrics.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_adapters_agree_in_their_curves_and_tensors(matrix: ModuleType) -> None:
    near, far = {"weights": 1e-5}, {"weights": 2e-3}
    assert matrix.agrees({"verdict": AGREE, "pairs": [near, near]})
    assert not matrix.agrees({"verdict": AGREE, "pairs": [near, far]})
    assert not matrix.agrees({"verdict": DIFFER, "pairs": [near, near]})


@pytest.mark.slow
def test_backends_meshes_and_the_witness_are_one_training(
    matrix: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    assert matrix.main(["--reduced", "--out", str(out)]) == 0
    found = json.loads((out / "parity.json").read_text())
    assert [run["backend"] for run in found["runs"]] == [
        "torch_xla", "torch_xla", "torch_native", "torch_native", "transformers",
    ]  # fmt: skip
    assert found["runs"][1]["mesh"]["tensor"] == 2 and found["runs"][3]["mesh"]["fsdp"] == 2
    assert found["steps"]["judged"] == matrix.REDUCED_STEPS
    for pair in found["pairs"]:
        assert pair["verdict"] == AGREE and pair["data"]["steps_with_hashes"] == 8
        assert pair["quantities"]["loss"]["worst"]["band"] == 1e-4
    # The same runs with one number of one of them off by more than the band.
    runs = [f"{run['label']}={run['path']}" for run in found["runs"]]
    change(Path(found["runs"][3]["path"]) / "metrics.jsonl", 7, 1 + 2e-4)
    other = matrix.judge(runs, tmp_path, "--figure", "none")
    assert [pair["verdict"] for pair in other["pairs"]] == [AGREE, AGREE, DIFFER, AGREE]
    assert other["pairs"][2]["first_beyond"]["step"] == 7


@pytest.fixture(scope="module")
def in_bf16(
    matrix: ModuleType, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The verdict on cases against one process of ours, by the floor that the repository keeps."""
    out = tmp_path_factory.mktemp("bf16")
    overrides = [*matrix.bf16_experiment(BF16_STEPS), *matrix.CURVES_ALONE]
    name = "native, 1 process"
    reference = matrix.run_case(name, matrix.CASES[name], overrides, out)

    def judge(cases: dict[str, Any]) -> dict[str, Any]:
        runs = [reference, *matrix.run_cases(cases, overrides, out)]
        return matrix.judge(runs, out, "--noise-floor", str(matrix.FLOOR), "--figure", "none")

    return judge


@pytest.mark.slow
def test_in_bf16_the_witness_is_within_the_measured_noise(matrix: ModuleType, in_bf16) -> None:
    witness = "transformers.Trainer"
    assert witness not in [r["label"] for r in json.loads(matrix.FLOOR.read_text())["runs"]]
    found = in_bf16({witness: matrix.JUDGED_CASES[witness]})
    assert found["verdict"] == AGREE and found["steps"]["judged"] == BF16_STEPS
    assert found["runs"][1]["dtype"] == "bfloat16"


@pytest.mark.slow
def test_in_bf16_a_wrong_optimizer_is_beyond_the_noise(matrix: ModuleType, in_bf16) -> None:
    wrong = "native, another beta1"
    found = in_bf16({wrong: matrix.WRONG_CASES[wrong]})
    assert found["verdict"] == DIFFER
    assert found["pairs"][0]["data"]["same"] is True
