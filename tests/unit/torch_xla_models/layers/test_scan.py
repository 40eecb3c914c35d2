"""Layers of several kinds in loops: the numbers of transformers, and programs that do not grow."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
import torch_xla
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    Olmo3Config,
    PretrainedConfig,
    Qwen3Config,
)

from torchprime.config.schema import AXES
from torchprime.config.sections.remat import RematConfig
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM
from torchprime.torch_xla_models.backend import XlaBackend
from torchprime.torch_xla_models.layers.remat import apply_remat
from torchprime.torch_xla_models.layers.scan import names_in_stack
from torchprime.training.backend import StepOptions
from torchprime.training.optim.sgd import Sgd

SHAPE: dict[str, Any] = dict(
    vocab_size=reference.V,
    hidden_size=16,
    intermediate_size=32,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=4,
)
LOCAL, GLOBAL = "sliding_attention", "full_attention"


def qwen(types: list[str]) -> PretrainedConfig:
    windows: dict[str, Any] = dict(use_sliding_window=True, sliding_window=5, layer_types=types)
    return Qwen3Config(**SHAPE, num_hidden_layers=len(types), **windows)


# Two rounds of three layers, and one layer more.
TYPES = [LOCAL, LOCAL, GLOBAL] * 2 + [LOCAL]
DEEP: dict[str, Any] = SHAPE | dict(
    num_hidden_layers=len(TYPES), layer_types=TYPES, sliding_window=5, pad_token_id=None
)
CONFIGS = {
    "gemma2": Gemma2Config(
        **DEEP,
        query_pre_attn_scalar=6,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=1.5,
    ),
    "gemma3": Gemma3TextConfig(
        **DEEP,
        query_pre_attn_scalar=6,
        rope_parameters={
            GLOBAL: {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            LOCAL: {"rope_type": "default", "rope_theta": 100.0},
        },
    ),
    "olmo3": Olmo3Config(**{k: v for k, v in DEEP.items() if k != "head_dim"}),
}
WAYS: dict[str, dict[str, Any]] = {
    "full": dict(mesh={"fsdp": 2, "tensor": 2}, remat=RematConfig(policy="full", scan_layers=True)),
    "attention": dict(mesh={"fsdp": 4}, remat=RematConfig(policy="attention", scan_layers=True)),
}
RATE = 0.3


def theirs(config: PretrainedConfig) -> tuple[dict, list[float], dict]:
    """transformers' weights before and after two steps of SGD, and losses."""
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            parameter.data.normal_(0.0, 0.2)
    start = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    losses = []
    for step in range(2):
        optimizer.zero_grad()
        loss = reference.loss_of(model, reference.make_batch(step))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return start, losses, {n: p.detach() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("gemma3", "full"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("gemma2", "attention"), ("gemma3", "attention"), ("olmo3", "full"))
        ),
    ],
)
def test_layers_of_several_kinds_in_loops(name: str, way: str, shipped_table) -> None:
    config = CONFIGS[name]
    start, losses, after = theirs(config)
    mesh = WAYS[way]["mesh"]
    backend = XlaBackend(
        {axis: mesh.get(axis, 1) for axis in AXES},
        dict.fromkeys(AXES, 1),
        remat=WAYS[way]["remat"],
    )
    with torch.device("meta"):
        model = CausalLM(architecture_from_hf(config.to_dict()))
    backend.place(model, shipped_table, start.__getitem__, torch.float32)
    assert not config.tie_word_embeddings or "lm_head.weight" not in start
    stacks = {n.split(".")[2] for n, _ in model.named_parameters() if ".layers." in n}
    assert stacks == {"stacked_0_3", "stacked_1_3", "stacked_2_3", "6"}
    backend.prepare_training(Sgd(momentum=0.0), StepOptions(loss_chunks=3, max_grad_norm=None))
    found = []
    for step in range(2):
        batch = backend.put(reference.make_batch(step), 1)
        found.append(backend.read(backend.train_step(batch, RATE)).loss)
    assert found == pytest.approx(losses, rel=1e-5)
    ours = dict(backend.weights())
    assert ours.keys() == after.keys()
    for weight, expected in after.items():
        moved = (expected - start[weight]).abs().max()
        error = (ours[weight] - expected).abs().max()
        assert moved > 0 and error < 1e-4 * moved, f"{weight}: {error:.1e} of {moved:.1e}"


def lines_of_step(config: PretrainedConfig) -> int:
    """The number of lines of the program of loss and gradients."""
    model = CausalLM(architecture_from_hf(config.to_dict())).to("xla")

    def unchanged(_: str, tensor: Tensor) -> Tensor:
        return tensor

    remat = RematConfig(policy="full", scan_layers=True)
    apply_remat(model, remat, shard_gradient=unchanged, shard_output=unchanged)
    model.to("xla")
    ids = torch.ones(2, 8, dtype=torch.int64, device="xla")
    loss = model(ids, ids, ids).sum()
    gradients = torch.autograd.grad(loss, list(model.model.layers.parameters()))
    program = torch_xla._XLAC._get_xla_tensors_hlo([loss, *gradients])  # pyright: ignore
    return len(program.splitlines())


def test_a_deeper_model_is_no_larger_program() -> None:
    sizes = [lines_of_step(qwen([LOCAL, LOCAL, GLOBAL] * rounds + [LOCAL])) for rounds in (2, 5)]
    assert sizes[0] == sizes[1]
    assert sizes[0] > 1.5 * lines_of_step(qwen([GLOBAL] * 7))


def test_names_in_a_stack() -> None:
    assert names_in_stack("model.layers.stacked_2_3.mlp.up_proj.weight", 2) == (
        "model.layers.2.mlp.up_proj.weight",
        "model.layers.5.mlp.up_proj.weight",
    )
    assert names_in_stack("model.layers.stacked.x", 2) == ("model.layers.0.x", "model.layers.1.x")
    assert names_in_stack("model.layers.6.x", 2) is None
