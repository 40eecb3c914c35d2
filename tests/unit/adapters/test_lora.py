"""LoRA and DoRA against transformers + PEFT + torch.optim: loss, gradients, weights after 50
steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from in_peft import lora_config
from torch import Tensor, nn
from transformers import PreTrainedModel

from torchprime.adapters.apply import apply_adapter, trainable
from torchprime.adapters.lora import AdaptedLinear, initial_values, merged_weight, weight_of
from torchprime.adapters.peft_format import file_name
from torchprime.adapters.quantized import quantized
from torchprime.adapters.spec import AdapterSpec
from torchprime.models.decoder import CausalLM

SPECS = {
    "lora": AdapterSpec(rank=4, alpha=8),
    "rslora": AdapterSpec(rank=4, alpha=8, scaling="rslora", targets=("q_proj", "down_proj")),
    "dora": AdapterSpec(rank=4, alpha=8, dora=True),
    "one layer": AdapterSpec(rank=4, alpha=16, layers=(1,)),
    "whole modules": AdapterSpec(
        rank=2, alpha=4, targets=("v_proj",), modules_to_train=("embed_tokens", "lm_head", "norm")
    ),
    "int8": AdapterSpec(rank=4, alpha=8, base_type="int8"),
    "nf4": AdapterSpec(rank=4, alpha=8, base_type="nf4"),
    "dora on nf4": AdapterSpec(rank=4, alpha=8, base_type="nf4", dora=True),
}


def quantize(model: nn.Module, spec: AdapterSpec) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, AdaptedLinear):
            assert isinstance(module.base_layer, nn.Linear)
            module.base_layer = quantized(module.base_layer, name, spec.base_type)


def fill(model: nn.Module, seed: int = 0) -> None:
    """Give new adapters their initial values, B too, so that its gradients reach A."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not isinstance(module, AdaptedLinear):
            continue
        spec = AdapterSpec(module.lora_A.out_features, 1, dora=module.dora)
        values = initial_values(spec, weight_of(module.base_layer), generator)
        values["lora_B.weight"].normal_(0, 0.1, generator=generator)
        missing = module.load_state_dict(values, strict=False)
        assert not missing.unexpected_keys


Pair = tuple[CausalLM, peft.PeftModel]


@pytest.fixture
def pair(
    ours: CausalLM, make_theirs: Callable[[], PreTrainedModel]
) -> Callable[[AdapterSpec], Pair]:
    """Makes both adapted models with equal weights."""

    def make(spec: AdapterSpec) -> Pair:
        theirs = make_theirs()
        apply_adapter(ours, spec)
        quantize(ours, spec)
        fill(ours)
        if spec.base_type != "run":
            for name, module in ours.named_modules():
                if isinstance(module, AdaptedLinear):
                    theirs.get_submodule(name).weight.data = weight_of(module.base_layer).clone()
        wrapped = peft.get_peft_model(theirs, lora_config(spec))
        tensors = {file_name(n): p.detach().clone() for n, p in trainable(ours).items()}
        assert set(tensors) == set(peft.get_peft_model_state_dict(wrapped))
        peft.set_peft_model_state_dict(wrapped, tensors)
        return ours, wrapped

    return make


def close(ours: Tensor, theirs: Tensor) -> None:
    scale = theirs.abs().max().clamp(min=1e-3)
    assert (ours - theirs).abs().max() <= 1e-5 * scale


def gradients_of(wrapped: peft.PeftModel) -> dict[str, Tensor]:
    """PEFT's gradients by the names of its files."""
    grads = {n: p.grad for n, p in wrapped.named_parameters() if p.requires_grad}
    return peft.get_peft_model_state_dict(wrapped, state_dict=grads)


@pytest.mark.parametrize("name", SPECS)
def test_equal_to_peft_over_50_steps(
    name: str,
    pair: Callable[[AdapterSpec], Pair],
    batches: list[Tensor],
    our_loss: Callable[[CausalLM, Tensor], Tensor],
) -> None:
    model, wrapped = pair(SPECS[name])
    parameters = trainable(model)
    # Adam divides by the gradient's size: eps is above the rounding of gradients near 0.
    options: dict[str, Any] = dict(lr=1e-3, weight_decay=0.0, eps=1e-4)
    optimizer = torch.optim.AdamW(parameters.values(), **options)
    moving = [p for p in wrapped.parameters() if p.requires_grad]
    assert sum(p.numel() for p in moving) == sum(p.numel() for p in parameters.values())
    reference = torch.optim.AdamW(moving, **options)
    for step, ids in enumerate(batches):
        loss = our_loss(model, ids)
        expected = wrapped(input_ids=ids, labels=ids).loss
        close(loss, expected)
        loss.backward()
        expected.backward()
        if step == 0:
            theirs = gradients_of(wrapped)
            for key, parameter in parameters.items():
                assert parameter.grad is not None and parameter.grad.abs().max() > 0
                close(parameter.grad, theirs[file_name(key)])
        for each in (optimizer, reference):
            each.step()
            each.zero_grad()
    final = peft.get_peft_model_state_dict(wrapped)
    for key, parameter in parameters.items():
        close(parameter.detach(), final[file_name(key)])


@pytest.mark.parametrize("name", ["lora", "rslora", "dora"])
def test_merged_weights_are_those_of_peft(name: str, pair: Callable[[AdapterSpec], Pair]) -> None:
    spec = SPECS[name]
    model, wrapped = pair(spec)
    merged = wrapped.merge_and_unload().state_dict()
    for key, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            magnitude = module.lora_magnitude_vector if spec.dora else None
            factors = module.lora_A.weight, module.lora_B.weight
            base = weight_of(module.base_layer)
            close(merged_weight(base, *factors, spec.scale, magnitude), merged[f"{key}.weight"])


def test_a_new_adapter_changes_nothing(
    ours: CausalLM, batches: list[Tensor], our_loss: Callable[[CausalLM, Tensor], Tensor]
) -> None:
    before = our_loss(ours, batches[0])
    spec = AdapterSpec(rank=4, alpha=8, dora=True)
    apply_adapter(ours, spec)
    generator = torch.Generator().manual_seed(0)
    for module in ours.modules():
        if isinstance(module, AdaptedLinear):
            values = initial_values(spec, weight_of(module.base_layer), generator)
            module.load_state_dict(values, strict=False)
    assert torch.allclose(our_loss(ours, batches[0]), before, rtol=1e-6)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_initial_values_have_the_spread_of_pefts(init: Any) -> None:
    base = nn.Linear(512, 256)
    option = True if init == "kaiming" else "gaussian"
    config = peft.LoraConfig(r=64, target_modules=["0"], init_lora_weights=option)
    theirs = peft.get_peft_model(nn.Sequential(base), config).state_dict()
    expected = next(value for name, value in theirs.items() if "lora_A" in name)
    spec = AdapterSpec(rank=64, alpha=1, init=init)
    values = initial_values(spec, base.weight, torch.Generator().manual_seed(0))
    ours = values["lora_A.weight"]
    assert ours.std().item() == pytest.approx(expected.std().item(), rel=0.02)
    assert ours.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.2)
    assert not values["lora_B.weight"].any()
