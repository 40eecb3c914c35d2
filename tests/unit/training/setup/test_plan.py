"""The plan's estimate of memory against what the TPU's compiler counted in `make tpu-report`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from torchprime.config.compose import compose_config
from torchprime.errors import ConfigError
from torchprime.models.architecture import architecture_from_hf
from torchprime.training.setup.adapter import ModelForm
from torchprime.training.setup.model_files import find_architecture
from torchprime.training.setup.plan import Memory, estimate_memory, stored_parameters
from torchprime.training.setup.recipe import adapter_of, checked_table, optimizer_of

RESULTS = Path(__file__).parents[4] / "experimental" / "tpu_report" / "results.json"
CASES = ["8b-v5e-16", "8b-v6e-8-adafactor", "8b-v6e-8-8192-bf16-offload", "14b-v6e-8"]
ADAPTED = ["8b-lora-v6e-1-1024", "8b-qlora-v5e-1-1024", "8b-qlora-v5e-4-1024"]


def estimate(argv: list[str]) -> Memory:
    """As a run's plan has it."""
    config = compose_config(argv)
    found, _ = find_architecture(
        pretrained_model=config.model.pretrained_model,
        architecture=config.model.architecture,
        cache_dir=None,
    )
    architecture = architecture_from_hf(found)
    form = ModelForm(architecture, adapter_of(config))
    model = form.build(getattr(torch, config.torch_dtype))
    _, specs = checked_table(config, model)
    stored = stored_parameters(model)
    return estimate_memory(config, form, stored, specs, optimizer_of(config))


@pytest.mark.parametrize("case", [*CASES, *ADAPTED])
def test_weights_and_state_are_what_the_compiler_counts(case: str) -> None:
    """Its arguments are these and the batch, of less than a thousandth."""
    counted = json.loads(RESULTS.read_text())[case]
    memory = estimate(counted["argv"])
    arguments = counted["memory"]["argument"]
    kept = memory.weights + memory.frozen + memory.optimizer
    assert kept == pytest.approx(arguments, rel=1e-3)


def test_what_the_host_keeps_is_not_on_the_chip() -> None:
    argv = json.loads(RESULTS.read_text())["8b-v6e-8-8192-bf16-offload"]["argv"]
    kept, away = estimate([*argv, "remat=scan_full"]), estimate(argv)
    inputs = 32 * 8192 * 4096 * 2  # layers x tokens x hidden, bf16
    assert kept.activations - away.activations == inputs


def optimizer_bytes(*overrides: str) -> int:
    run = ["task=train", "model=llama-3.2-1b", "task.max_steps=1", "torch_dtype=bfloat16"]
    return estimate([*run, "dataset=gsm8k", *overrides]).optimizer


def test_state_is_counted_by_its_kind() -> None:
    hidden, inner, vocabulary, layers = 2048, 8192, 128256, 16
    norms = hidden * (2 * layers + 1)
    matrices = layers * (2 * hidden * hidden + 2 * 512 * hidden + 3 * hidden * inner)
    embedding = vocabulary * hidden
    masters = 4 * (norms + matrices + embedding)
    expected = {
        "adamw": 8 * (norms + matrices + embedding),
        "lion": 4 * (norms + matrices + embedding),
        "muon": 4 * matrices + 8 * (norms + embedding),
        "adamw_8bit": (matrices + embedding) * (2 + 2 * 4 / 256) + 8 * norms,
    }
    for name, state in expected.items():
        assert optimizer_bytes(f"task.optimizer.name={name}") == masters + state, name


def test_a_tensor_axis_that_cuts_a_block_is_refused() -> None:
    chosen = ["task.optimizer.name=adamw_8bit", "ici_mesh.tensor=8"]
    optimizer_bytes(*chosen)
    with pytest.raises(ConfigError) as caught:
        optimizer_bytes(chosen[0], "ici_mesh.tensor=16")
    message = str(caught.value)
    assert "given 'adamw_8bit'" in message
    assert "cuts the rows of model.layers.0.self_attn.o_proj.weight [2048, 2048]" in message


# Of an unknown chip with 8 rows of 1024: 4 chunks of 2048 tokens. All gradients by the logits, one
# chunk's logits, both bf16, and the fp32 sum of the output weight's gradient.
CHUNKS = 128_256 * (2 * (8192 + 2048) + 4 * 4096)


@pytest.mark.parametrize(
    ("overrides", "bytes_each", "logits"),
    [
        (["regularization.l2_sp.strength=1"], 2, 0),
        (["regularization.ewc.strength=1", "regularization.ewc.fisher=f"], 2 + 4, 0),
        (["regularization.kl.coefficient=1"], 2, CHUNKS),
        (["regularization.kl.coefficient=1", "regularization.l2_sp.strength=1"], 2, CHUNKS),
        (["adapter=lora", "regularization.kl.coefficient=1"], 0, 2 * 2 * 2048 * 128_256),
    ],
)
def test_regularizations_frozen_values_are_counted(
    overrides: list[str], bytes_each: int, logits: int
) -> None:
    """Beside each bf16 weight of a device; and as much for the base's logits as for the model's."""
    argv = json.loads(RESULTS.read_text())["8b-v6e-8-adafactor"]["argv"]
    model = ["model.pretrained_model=meta-llama/Llama-3.1-8B"]
    adapter = [each for each in overrides if each.startswith("adapter")]
    plain, held = (estimate([*argv, *model, *more]) for more in (adapter, overrides))
    assert held.reference == bytes_each * (plain.weights // 2)
    assert held.total >= plain.total + held.reference
    assert held.activations - plain.activations == logits
