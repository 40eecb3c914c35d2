"""Gated units with a barrier, against the plain ones."""

from __future__ import annotations

import pytest
import torch
import torch_xla
from torch import Tensor

from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import MLP, store_gated
from torchprime.torch_xla_models.layers.runner import behind_barrier

CONFIG = {
    "model_type": "llama", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 48,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "rms_norm_eps": 1e-5, "rope_theta": 1e4, "max_position_embeddings": 64,
}  # fmt: skip


def mlp(activation: str = "silu") -> MLP:
    torch.manual_seed(0)
    return MLP(architecture_from_hf({**CONFIG, "hidden_act": activation}))


def backward(module: MLP, x: Tensor) -> list[Tensor]:
    out = module(x)
    return list(torch.autograd.grad(out.square().sum(), [x, *module.parameters()]))


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
def test_gradients_are_those_of_the_plain_unit(activation: str) -> None:
    plain, x = mlp(activation), torch.randn(2, 8, 16, requires_grad=True)
    expected = [g.clone() for g in backward(plain, x)]
    device = torch_xla.device()
    stored = mlp(activation).to(device)
    store_gated(torch.nn.Sequential(stored), behind_barrier)
    found = backward(stored, x.detach().to(device).requires_grad_())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-5, atol=1e-6)


def test_products_read_what_is_behind_barriers() -> None:
    """Both gradients are behind one, the last projection's input behind another."""
    stored = mlp().to(torch_xla.device())
    store_gated(torch.nn.Sequential(stored), behind_barrier)
    x = torch.randn(2, 8, 16).to(torch_xla.device()).requires_grad_()
    text = torch_xla._XLAC._get_xla_tensors_hlo(backward(stored, x))  # pyright: ignore
    barriers = [line.split(" opt-barrier(") for line in text.splitlines()]
    found = [made[0].count("f32[2,8,48]") for made in barriers if len(made) > 1]
    assert sorted(found) == [1, 2]
