"""Steps of every kind, for a backend on simulated chips, one on XLA's CPU client, and the native.

It needs nothing but this package and torch, so both environments make the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torchtpu_case import HF, LR, make_batch, make_case

from torchprime.adapters.apply import apply_adapter
from torchprime.adapters.axes import adapter_patterns
from torchprime.adapters.quantized import quantize_base
from torchprime.adapters.spec import AdapterSpec
from torchprime.losses.token_loss import TokenLoss
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor
from torchprime.sharding import ShardingTable
from torchprime.torch_native.tpu.grid import Grid
from torchprime.training.backend import StepOptions
from torchprime.training.optim.make import make_optimizer
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.regularization.near_base import Kl
from torchprime.training.regularization.penalty import AnchorSource, Penalty
from torchprime.training.spikes import SpikeOptions

KL = {"loss_terms": ("kl",)}


@dataclass(frozen=True)
class Variant:
    """A step: what it adds to the case's options, its optimizer and its model."""

    options: dict[str, Any]
    optimizer: str = "adamw"
    adapter: AdapterSpec | None = None
    model: dict[str, Any] = field(default_factory=dict)  # besides the case's config.json
    grid: Grid = Grid(fsdp=2, tensor=2)
    accumulation: int = 1


LORA = AdapterSpec(4, 4.0)
# Quantized weights have blocks of 64 along their inputs, which a shard has whole.
WIDE = {**HF, "hidden_size": 128, "intermediate_size": 256}
# Projections in one matrix, and a kv head that both chips along `tensor` use.
FUSED = {"model_type": "phi3", "num_key_value_heads": 1, "pad_token_id": 0}
# Queries of a chip use kv heads unequally: 0, 0, 1 and 1, 2, 2.
UNEVEN = {
    "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "attention_bias": True,
}  # fmt: skip
VARIANTS: dict[str, Variant] = {
    "kl": Variant({**KL, "kl": Kl(0.5, "supervised")}, accumulation=2),
    "kl of all tokens": Variant({**KL, "kl": Kl(0.5, "all")}),
    "kl of an adapter": Variant({**KL, "kl": Kl(0.5, "supervised")}, adapter=LORA),
    "l2_sp": Variant({"step_terms": ("l2_sp",), "penalty": Penalty("l2_sp", 0.1)}),
    "ewc": Variant({"step_terms": ("ewc",), "penalty": Penalty("ewc", 0.1)}),
    "ewc and kl": Variant(
        {
            **KL,
            "kl": Kl(0.5, "supervised"),
            "step_terms": ("ewc",),
            "penalty": Penalty("ewc", 0.1),
        }
    ),
    "dropout": Variant(
        {"random_seed": 5},
        adapter=replace(LORA, dropout=0.3),
        grid=Grid(data=2, fsdp=2),
        accumulation=2,
    ),
    "noise": Variant({"random_seed": 5, "noise_alpha": 5.0}),
    "int8": Variant({}, adapter=replace(LORA, base_type="int8"), grid=Grid(fsdp=2)),
    "nf4": Variant({}, adapter=replace(LORA, base_type="nf4"), grid=Grid(fsdp=2)),
    "dora": Variant({}, adapter=replace(LORA, dora=True), grid=Grid(fsdp=2)),
    "z-loss": Variant(
        {
            "token_loss": TokenLoss(label_smoothing=0.1, z_loss=0.01),
            "loss_terms": ("cross_entropy", "z_loss"),
        },
        accumulation=2,
    ),
    "dft": Variant({"token_loss": TokenLoss(dft=True), "loss_terms": ("cross_entropy",)}),
    "spikes": Variant({"spikes": SpikeOptions(10, 3.0, True, 2)}),
    "fused": Variant({}, model=FUSED, accumulation=2),
    "fused adapter": Variant({"random_seed": 5}, adapter=replace(LORA, dropout=0.3), model=FUSED),
    "kv heads": Variant({}, model={"num_key_value_heads": 1}),
    "kv heads unevenly": Variant({}, adapter=LORA, model=UNEVEN),
    "kv heads, dropout": Variant(
        {"random_seed": 5}, adapter=replace(LORA, dropout=0.3), model=UNEVEN
    ),
    **{name: Variant({}, optimizer=name) for name in ("adafactor", "lion", "sgd")},
    "muon": Variant({}, optimizer="muon"),
    "adamw_8bit": Variant({}, optimizer="adamw_8bit", grid=Grid(fsdp=2)),
}


def optimizer_of(name: str) -> Optimizer:
    more: dict[str, Any] = {"momentum": 0.9} if name == "sgd" else {}
    return make_optimizer(name, betas=None, eps=1e-3, weight_decay=0.1, **more)


def model_of(variant: Variant, *, quantized: bool = True) -> CausalLM:
    spec = variant.adapter
    wide = spec is not None and spec.base_type != "run"
    model = CausalLM(architecture_from_hf((WIDE if wide else HF) | variant.model))
    if spec is not None:
        apply_adapter(model, spec)
        if quantized:
            quantize_base(model, spec.base_type, lambda _: 2)
    return model


def values_of(variant: Variant) -> dict[str, Tensor]:
    """Random weights, quantized as the base is."""
    spec, model = variant.adapter, model_of(variant, quantized=False)
    with torch.no_grad():
        for number, (name, parameter) in enumerate(model.named_parameters()):
            scale = 0.05 if ".lora_" in name else 0.2
            value = initial_tensor(name, parameter.shape, scale, 7) if parameter.dim() else number
            parameter.copy_(torch.as_tensor(value))
    if spec is not None:
        quantize_base(model, spec.base_type, lambda _: 2)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def table_of(spec: AdapterSpec | None) -> ShardingTable:
    table = make_case({}).table
    if spec is None:
        return table
    return ShardingTable(adapter_patterns(table.parameters, ("fsdp",)), table.activations, 10**6)


def two_steps(backend: Any, variant: Variant) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The numbers of two steps, and the weights after them."""
    spec, start = variant.adapter, values_of(variant)
    plain = make_case({"accumulation": variant.accumulation}).options
    options: StepOptions = replace(plain, **variant.options)
    needs_base = options.kl is not None and spec is None
    with torch.device("meta"):
        model = model_of(variant)

    def base(name: str) -> Tensor:
        return start[name] * 0.9

    def fisher(name: str) -> Tensor:
        return start[name].float().abs() + 0.1

    tensor_of: Callable[[str], Tensor] = lambda name: start[name].clone()  # noqa: E731
    backend.check(model, table_of(spec))
    backend.place(model, table_of(spec), tensor_of, torch.float32, base if needs_base else None)
    has_fisher = options.penalty is not None and options.penalty.has_fisher
    anchors = AnchorSource(base, fisher if has_fisher else None) if options.penalty else None
    backend.prepare_training(optimizer_of(variant.optimizer), options, None, anchors)
    numbers = []
    for step in range(2):
        batch = backend.put(make_batch(step), variant.accumulation)
        found = backend.read(backend.train_step(batch, LR))
        numbers.append([found.loss, found.grad_norm, *found.terms.values()])
    return numbers, {name: weight.clone() for name, weight in backend.weights()}
