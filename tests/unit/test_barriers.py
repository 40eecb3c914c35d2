"""Gated units with barriers, against the plain ones."""

from __future__ import annotations

import pytest
import torch
import torch_xla
from torch import Tensor

from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import MLP, put_barriers
from torchprime.torch_xla_models.layers.runner import behind_barrier

LLAMA = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64,
}  # fmt: skip
FUSED = LLAMA | {"model_type": "phi3", "pad_token_id": None}


def mlp(config: dict) -> MLP:
    torch.manual_seed(0)
    return MLP(architecture_from_hf(config))


def on_device(config: dict) -> MLP:
    module = mlp(config).to(torch_xla.device())
    put_barriers(torch.nn.Sequential(module), behind_barrier)
    return module


def backward(module: MLP, x: Tensor) -> list[Tensor]:
    out = module(x)
    return list(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]))


@pytest.mark.parametrize(
    "config",
    [LLAMA, LLAMA | {"hidden_act": "gelu_pytorch_tanh"}, FUSED],
    ids=["silu", "gelu", "fused"],
)
def test_gradients_are_those_of_the_plain_unit(config: dict) -> None:
    x = torch.randn(2, 8, 16, requires_grad=True)
    expected = backward(mlp(config), x)
    found = backward(on_device(config), x.detach().to(torch_xla.device()).requires_grad_())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("config", "gradients"), [(LLAMA, (2, 48)), (FUSED, (1, 96))])
def test_what_products_read_is_behind_barriers(config: dict, gradients: tuple[int, int]) -> None:
    """The last projection's input behind one, the gradients behind another."""
    x = torch.randn(2, 8, 16).to(torch_xla.device()).requires_grad_()
    made = backward(on_device(config), x)
    text = torch_xla._XLAC._get_xla_tensors_hlo(made)  # pyright: ignore
    lines = [line.split(" opt-barrier(") for line in text.splitlines()]
    found = [line[0].split("=")[1] for line in lines if len(line) > 1]
    assert len(found) == 2
    count, width = gradients
    assert any(each.count("f32[2,8,48]") == 1 and each.count("f32") == 1 for each in found)
    assert any(each.count(f"f32[2,8,{width}]") == count == each.count("f32") for each in found)
