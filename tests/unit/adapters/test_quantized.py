"""Quantized layers against a plain layer that holds the dequantized weight."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchprime.adapters.quantized import QuantizedLinear, quantized
from torchprime.adapters.spec import BaseType
from torchprime.errors import ConfigError

KINDS: list[BaseType] = [kind for kind in get_args(BaseType) if kind != "run"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: BaseType, bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(128, 24, bias=bias)
    layer = quantized(plain, "x", kind)
    assert isinstance(layer, QuantizedLinear)
    weight = layer.dequantized()
    assert 0 < (weight - plain.weight).abs().max() < 0.02
    x = torch.randn(2, 5, 128, requires_grad=True)
    same = x.detach().clone().requires_grad_()
    out, expected = layer(x), F.linear(same, weight, plain.bias)
    torch.testing.assert_close(out, expected)
    out.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, same.grad)


@pytest.mark.parametrize("kind", KINDS)
def test_no_full_weight_is_kept_between_forward_and_backward(kind: BaseType) -> None:
    layer = quantized(nn.Linear(128, 64, bias=False), "x", kind)
    saved: list[torch.Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with hooks:
        layer(torch.randn(2, 128, requires_grad=True))
    assert all(t.numel() < 128 * 64 for t in saved)


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.05), ("nf4", 0.53)])
def test_bytes_of_a_weight(kind: BaseType, most: float) -> None:
    layer = quantized(nn.Linear(1024, 256, bias=False), "x", kind)
    size = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert size <= most * 1024 * 256
    assert not any(p.requires_grad for p in layer.parameters())


def test_inputs_that_are_no_multiple_of_a_block() -> None:
    with pytest.raises(ConfigError, match=r"base_dtype: given nf4.*mlp.up_proj has 96 inputs"):
        quantized(nn.Linear(96, 8), "mlp.up_proj", "nf4")
    with pytest.raises(ConfigError, match=r"128 inputs in 4 shards. Expected a multiple of 256"):
        quantized(nn.Linear(128, 8), "x", "nf4", groups=4)
