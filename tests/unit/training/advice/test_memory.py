"""Estimates of memory, against what torch's memory tracker sees on the native backend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forks import ForkServer

from torchprime.config.compose import compose_config
from torchprime.models.architecture import architecture_from_hf
from torchprime.training.advice.memory import Estimator, Need
from torchprime.training.advice.table import Devices, devices_named
from torchprime.training.setup.adapter import ModelForm
from torchprime.training.setup.model_files import find_architecture
from torchprime.training.setup.recipe import adapter_of

RESULTS = Path(__file__).parents[4] / "experimental" / "tpu_report" / "results.json"
COMPILED = {name: case for name, case in json.loads(RESULTS.read_text()).items()
            if case.get("topology") and case.get("memory")}  # fmt: skip
WORKER = Path(__file__).parent / "memory_worker.py"
HERE = Devices("cpu", "gpu", 1, 2**40, 1.0)
# layers, hidden, feed-forward, vocabulary, blocks, block size, dtype
SHAPES = {
    "deep": (6, 128, 512, 1000, 4, 128, "float32"),
    "wide": (2, 512, 1408, 3000, 1, 384, "float32"),
    "bf16": (3, 256, 704, 2000, 2, 256, "bfloat16"),
}
WAYS = {"all weights": "adapter=none", "lora": "adapter=lora"}
CASES = [
    (shape, way, remat)
    for shape in SHAPES
    for way in WAYS
    for remat in ("none", "attention", "full")
]


def case(shape: str, way: str, remat: str) -> dict[str, Any]:
    layers, hidden, ffn, vocabulary, rows, size, dtype = SHAPES[shape]
    architecture = {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": ffn,
        "num_hidden_layers": layers, "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 64, "vocab_size": vocabulary, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
        "tie_word_embeddings": False,
    }  # fmt: skip
    argv = [
        "model.pretrained_model=x", "task.max_steps=1", WAYS[way], f"remat.policy={remat}",
        f"dataset.block_size={size}", f"task.global_batch_size={rows}", f"torch_dtype={dtype}",
        "task.loss_chunks=4",
    ]  # fmt: skip
    return {"argv": argv, "architecture": architecture}


def estimate(given: dict[str, Any]) -> Need:
    config = compose_config(given["argv"])
    form = ModelForm(architecture_from_hf(given["architecture"]), adapter_of(config))
    estimator = Estimator(config, form, HERE, core="reference")
    return estimator.need(config.task.global_batch_size, 1)


@pytest.fixture(scope="module")
def measured(
    fork_server: ForkServer, tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, str], dict[str, int]]:
    out = tmp_path_factory.mktemp("memory") / "measured.json"
    cases = json.dumps([case(*each) for each in CASES])
    [ended] = [rank.end(200) for rank in fork_server.group(1, WORKER, str(out), cases)]
    assert ended.code == 0, ended.printed
    return dict(zip(CASES, json.loads(out.read_text()), strict=True))


@pytest.mark.parametrize("which", CASES, ids=" ".join)
def test_bytes_are_within_5_percent_and_activations_within_15(
    which: tuple[str, str, str], measured: dict[tuple[str, str, str], dict[str, int]]
) -> None:
    need, seen = estimate(case(*which)), measured[which]
    assert need.weights == pytest.approx(seen["weights"], rel=0.05)
    assert need.masters + need.state == pytest.approx(seen["state"], rel=0.05)
    assert need.gradients == pytest.approx(seen["gradients"], rel=0.05)
    moving = sum(seen[f"peak_{kind}"] for kind in ("Activation", "Temp", "Reduce Scatter"))
    estimated = need.activations + need.working + need.reduced
    assert estimated == pytest.approx(moving, rel=0.15)


@pytest.mark.parametrize("which", CASES, ids=" ".join)
def test_a_plan_that_fits_is_not_below_the_truth(
    which: tuple[str, str, str], measured: dict[tuple[str, str, str], dict[str, int]]
) -> None:
    """The tracker saw no optimizer state, since no update ran."""
    need, seen = estimate(case(*which)), measured[which]
    assert need.total - need.state - need.masters >= 0.99 * seen["peak_Total"]


@pytest.mark.parametrize("name", COMPILED)
def test_a_tpu_s_estimate_is_near_the_compiler_s_count(name: str) -> None:
    """The table's part of a TPU's memory that a plan may fill rests on the lower bound."""
    counted = COMPILED[name]
    # Older ones were compiled when 8 chunks of the loss were the default.
    chunks = counted["settings"]["loss_chunks"]
    given = [] if chunks is None else [f"task.loss_chunks={chunks}"]
    config = compose_config([*counted["argv"], *given])
    found, _ = find_architecture(
        pretrained_model=config.model.pretrained_model,
        architecture=config.model.architecture,
        cache_dir=None,
    )
    form = ModelForm(architecture_from_hf(found), adapter_of(config))
    devices = devices_named(counted["topology"])
    estimator = Estimator(config, form, devices, longest=1)  # the step has no generation
    rows = max(1, config.task.micro_batch_size // estimator.batch_shards)
    need = estimator.need(rows, config.task.gradient_accumulation_steps)
    total = counted["memory"]["total"]
    assert devices.fill * total <= need.total <= 1.3 * total


@pytest.mark.parametrize(
    ("argv", "device", "fits"),
    [
        ([], "h100-80gb", False),  # 16 bytes a weight: 120 GiB before any activation
        ([], "h200-141gb:8", True),
        (["adapter=lora"], "h100-80gb", True),
        (["adapter=lora"], "rtx-4090", True),
        (["adapter=lora"], "t4-16gb", False),  # 15 GiB of frozen weights
        (["adapter=qlora"], "t4-16gb", True),
    ],
)
def test_what_is_known_to_fit(argv: list[str], device: str, fits: bool) -> None:
    devices = devices_named(device)
    config = compose_config([
        "--config-name", "llama-3-8b-sft-w-gsm8k", f"ici_mesh.fsdp={devices.count}",
        "eval=none", "task.sample_prompts=0", *argv,
    ])  # fmt: skip
    found, _ = find_architecture(
        pretrained_model=config.model.pretrained_model,
        architecture=config.model.architecture,
        cache_dir=None,
    )
    form = ModelForm(architecture_from_hf(found), adapter_of(config))
    assert (Estimator(config, form, devices).largest_rows() > 0) == fits
