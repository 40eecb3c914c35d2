"""The whole step as one program on TorchTPU, against the native backend over gloo.

TorchTPU needs another torch, so it has an environment of its own (`make test-torchtpu` makes it).
There the step is lowered as for chips, and XLA's CPU client runs the module on 1 and 8 virtual
devices. The reference is the native backend of this environment: 2 processes, FSDP2, eager torch.
No TPU takes part.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from torchprime.compiling.hlo.program import Program
from torchprime.torch_native.backend import NativeBackend
from torchprime.torch_native.runtime import stop_processes
from torchprime.torch_native.tpu.environment import without_chip

REPO = Path(__file__).resolve().parents[2]
PYTHON = Path(
    os.environ.get("TORCHPRIME_TORCHTPU_PYTHON") or REPO / ".venv-torchtpu" / "bin" / "python"
)
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "unit" / "torch_native" / "chips")]
from step_variants import VARIANTS, two_steps  # noqa: E402

REFERENCES: dict[str, dict[str, Any]] = {
    "full": {"mesh": {"fsdp": 2}},
    "lora": {"mesh": {"fsdp": 2}, "lora": 4},
    "long": {"mesh": {"fsdp": 2}, "length": 256},
    "gemma2": {"mesh": {"fsdp": 2}, "gemma2": True},
}
# The reference of each way, and the way.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("full", {"mesh": {}}),
    "fsdp8": ("full", {"mesh": {"fsdp": 8}}),
    "data2_fsdp4": ("full", {"mesh": {"data": 2, "fsdp": 4}}),
    "fsdp4_tensor2": ("full", {"mesh": {"fsdp": 4, "tensor": 2}}),
    "accumulation": ("full", {"mesh": {"fsdp": 4, "tensor": 2}, "accumulation": 4}),
    "unrolled": ("full", {"mesh": {"fsdp": 8}, "remat": False}),
    # The attention kernels, in Pallas' interpreter; the reference has the reference core.
    "kernels": ("long", {"mesh": {"fsdp": 8}, "kernels": True, "length": 256}),
    "kernels_tensor": (
        "long",
        {"mesh": {"fsdp": 4, "tensor": 2}, "kernels": True, "length": 256, "accumulation": 2},
    ),
    # Capped scores and logits, and layers of two kinds.
    "gemma2": ("gemma2", {"mesh": {"fsdp": 4, "tensor": 2}, "gemma2": True, "accumulation": 2}),
    "lora": ("lora", {"mesh": {"data": 2, "fsdp": 4}, "lora": 4}),
    "lora_tensor": ("lora", {"mesh": {"fsdp": 4, "tensor": 2}, "lora": 4}),
}

pytestmark = [
    pytest.mark.torchtpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: run make test-torchtpu"),
]


def command(*words: object) -> None:
    ours = ("PJRT_", "CPU_NUM_", "JAX_")  # tests/conftest.py sets a number of devices, too
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env |= {"PYTHONPATH": str(REPO), "OMP_NUM_THREADS": "1", **without_chip()}
    done = subprocess.run(
        [str(w) for w in words], env=env, cwd=HERE, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder, found = tmp_path_factory.mktemp("native"), {}
    for name, way in REFERENCES.items():
        out = folder / f"{name}.pt"
        launch = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--standalone",
        ]
        command(*launch, HERE / "torchtpu_native.py", out, json.dumps(way))
        found[name] = torch.load(out, weights_only=True)
    return found


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("torchtpu")
    ways = {name: way for name, (_, way) in WAYS.items()}
    command(PYTHON, HERE / "torchtpu_worker.py", folder, json.dumps(ways))
    return {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ways}


@pytest.mark.parametrize("name", WAYS)
def test_ten_steps_equal_the_native_backend(name: str, references, programs) -> None:
    reference, found = references[WAYS[name][0]], programs[name]
    for step, (ours, theirs) in enumerate(zip(found["numbers"], reference["numbers"], strict=True)):
        assert ours == pytest.approx(theirs, rel=1e-5), f"loss and norm of step {step}"
    compared = [
        key for key in reference["weights"] if reference["weights"][key].dtype.is_floating_point
    ]
    assert compared
    for key in compared:
        theirs, ours = reference["weights"][key], found["weights"][key]
        assert float((ours - theirs).abs().max()) <= 1e-5 * max(1.0, float(theirs.abs().max())), key


def test_steps_of_every_kind_equal_the_native_backend(tmp_path: Path) -> None:
    command(PYTHON, HERE / "torchtpu_variants.py", tmp_path / "found.pt")
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    assert found.keys() == VARIANTS.keys()
    try:
        for name, variant in VARIANTS.items():
            native = NativeBackend({}, {}, full_precision=True)
            (numbers, ours), (expected, theirs) = found[name], two_steps(native, variant)
            assert numbers == [pytest.approx(each, rel=1e-5) for each in expected], name
            assert ours.keys() == theirs.keys()
            for key, weight in theirs.items():
                torch.testing.assert_close(ours[key], weight, rtol=1e-5, atol=1e-5, msg=key)
    finally:
        stop_processes()


def test_interfaces_that_only_chips_use_are_there() -> None:
    command(PYTHON, HERE / "torchtpu_interfaces.py")


def without_kernels(text: str) -> str:
    """A module without the functions that have the kernels' content."""
    start = "\n  func.func "
    kept = [each for each in text.split(start) if not each.startswith("private @splash_")]
    return start.join(kept).rstrip("}\n")


@pytest.mark.parametrize("name", ["data2_fsdp4", "kernels"])
def test_the_same_module_compiles_for_a_tpu(name: str, programs, tmp_path: Path) -> None:
    way = {name: WAYS[name][1]}
    command(PYTHON, HERE / "torchtpu_worker.py", tmp_path, json.dumps(way), "v6e")
    found = torch.load(tmp_path / f"{name}.pt", weights_only=True)
    ours, run = without_kernels(found["text"]), without_kernels(programs[name]["text"])
    assert ours == run, "another module than the one that was run"
    assert found["memory"]["alias"] > 0
    # Three layers; the forward once more in each backward.
    kernels = {"splash_forward": 6, "splash_backward": 3} if "kernels" in way[name] else {}
    assert Program((tmp_path / "program.txt").read_text()).kernels() == kernels
    assert ("tpu_custom_call" in found["text"]) == bool(kernels)
    assert "custom_call" not in ours


# Small, but with dims that a TPU's tiles do not pad.
SMALL = [
    "--config-name", "llama-3-8b-sft-w-gsm8k", "run_name=small", "task=train",
    "model=llama-3.2-1b", "model.pretrained_model=null", "model.architecture.num_hidden_layers=3",
    "model.architecture.hidden_size=512", "model.architecture.intermediate_size=1024",
    "model.architecture.num_attention_heads=4", "model.architecture.num_key_value_heads=2",
    "model.architecture.head_dim=128", "model.architecture.vocab_size=2048",
    "model.architecture.rope_scaling=null", "dataset.block_size=512", "task.loss_chunks=4",
    "task.global_batch_size=16", "task.max_steps=1", "mesh=fsdp8", "compile_only=v6e-8",
]  # fmt: skip


def test_compile_only_reports_the_step(tmp_path: Path) -> None:
    run = [PYTHON, "-m", "torchprime.cli.main", "train", *SMALL]
    command(*run, f"output_dir={tmp_path}")
    report = json.loads((tmp_path / "small-v6e-8" / "compile_report.json").read_text())
    assert report["fits"] and report["runtime"] == "torch-tpu"
    assert report["versions"]["libtpu"] == "0.0.52"
    # Three layers; the forward once more in each backward.
    assert report["kernels"] == {"splash_forward": 6, "splash_backward": 3}
    assert report["loops"] == [3, 3]
    assert report["flops"]["ratio"] == pytest.approx(1.0, abs=0.01)
    moved = {kind: numbers["bytes"] for kind, numbers in report["collectives"].items()}
    theory = report["collectives_in_theory"]
    # The compiler gathers the embedding or the output weight once instead of twice.
    assert 0.9 * theory["all-gather"] < moved["all-gather"] < 1.05 * theory["all-gather"]
    reduced = moved["reduce-scatter"] + moved["all-reduce"]
    assert 0.9 * theory["reduce-scatter"] < reduced < 1.1 * theory["reduce-scatter"]
    # Weights and state are written in place.
    assert report["memory"]["alias"] == pytest.approx(report["state_bytes"], rel=0.02)
