"""Quantized layers against a plain layer that holds the dequantized weight."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torchprime.adapters.apply import apply_adapter, trainable
from torchprime.adapters.lora import weight_of
from torchprime.adapters.quantized import (
    QuantizedLinear,
    placed_type,
    quantize_base,
    quantized,
)
from torchprime.adapters.spec import AdapterSpec, BaseType
from torchprime.errors import ConfigError
from torchprime.models.decoder import CausalLM

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
    assert all(t.nbytes < 2 * 128 * 64 for t in saved)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_tensors_given_in_the_call(kind: BaseType) -> None:
    """functional_call puts the layer's own tensors back before the backward."""
    torch.manual_seed(0)
    layer, other = (quantized(nn.Linear(128, 24, bias=False), "x", kind) for _ in range(2))
    x = torch.randn(2, 128, requires_grad=True)
    given = {name: p.detach() for name, p in other.named_parameters()}
    torch.func.functional_call(layer, given, x).sum().backward()
    expected = weight_of(other).sum(0).expand(2, 128)
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_base(kind: BaseType, ours: CausalLM) -> None:
    """All frozen layers but the output projection; on meta the same shapes and types."""
    spec = AdapterSpec(
        rank=4, alpha=8, targets=("q_proj",), modules_to_train=("o_proj",), base_type=kind
    )
    asked: list[str] = []
    models = [ours, copy.deepcopy(ours).to("meta")]
    for model in models:
        apply_adapter(model, spec)
        before = trainable(model).keys()
        quantize_base(model, kind, lambda name: asked.append(name) or 1)
        assert trainable(model).keys() == before
    found = [{n: (p.shape, p.dtype) for n, p in model.named_parameters()} for model in models]
    assert found[0] == found[1]
    assert all(p.is_meta for n, p in models[1].named_parameters() if not n.endswith("number"))
    layer = ours.get_submodule("model.layers.1")
    kinds = {name for name, m in layer.named_modules() if isinstance(m, QuantizedLinear)}
    names = ("self_attn.q_proj.base_layer", "self_attn.k_proj", "self_attn.v_proj")
    assert kinds == {*names, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}
    assert "model.layers.1.self_attn.q_proj" in asked and "lm_head" not in asked


def test_types_in_a_run() -> None:
    half = torch.bfloat16
    layer = quantized(nn.Linear(128, 8), "x", "nf4")
    types = {name: placed_type(f"a.{name}", p, half) for name, p in layer.named_parameters()}
    kept = {"packed": torch.uint8, "scale_codes": torch.uint8, "scale_scales": torch.float32}
    assert types == {"bias": half, "offset": torch.float32, **kept}
    number = torch.tensor(3, dtype=torch.int32)
    assert placed_type("a.lora_dropout.number", number, half) == torch.int32


@pytest.mark.parametrize(("kind", "most"), [("int8", 1.05), ("nf4", 0.53)])
def test_bytes_of_a_weight(kind: BaseType, most: float) -> None:
    layer = quantized(nn.Linear(1024, 256, bias=False), "x", kind)
    size = sum(p.numel() * p.element_size() for p in layer.parameters())
    assert size <= most * 1024 * 256
    assert not any(p.requires_grad for p in layer.parameters())


def test_sizes_that_nf4_can_not_store() -> None:
    with pytest.raises(ConfigError, match=r"base_dtype: given nf4.*mlp.up_proj has .* \[5, 96\]"):
        quantized(nn.Linear(96, 5), "mlp.up_proj", "nf4")
    with pytest.raises(ConfigError, match=r"in 4 shards .* of 8 inputs: use base_dtype=int8"):
        quantized(nn.Linear(132, 16), "x", "nf4", groups=8 // 2)
