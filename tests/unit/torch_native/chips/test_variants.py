"""Steps of every kind on simulated chips, against the native backend in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from simulated import simulated_backend
from torch import Tensor
from torchtpu_case import HF, LR, make_batch, make_case

from torchprime.adapters.apply import apply_adapter
from torchprime.adapters.axes import adapter_patterns
from torchprime.adapters.quantized import quantize_base
from torchprime.adapters.spec import AdapterSpec
from torchprime.models.architecture import architecture_from_hf
from torchprime.models.decoder import CausalLM, initial_tensor
from torchprime.sharding import ShardingTable
from torchprime.torch_native.backend import NativeBackend
from torchprime.torch_native.runtime import stop_processes
from torchprime.torch_native.tpu.grid import Grid
from torchprime.training.backend import StepOptions
from torchprime.training.optim.make import make_optimizer
from torchprime.training.optim.optimizer import Optimizer
from torchprime.training.regularization.near_base import Kl
from torchprime.training.regularization.penalty import AnchorSource, Penalty

KL = {"loss_terms": ("kl",)}


@dataclass(frozen=True)
class Variant:
    """A step: what it adds to the case's options, its optimizer and its model."""

    options: dict[str, Any]
    optimizer: str = "adamw"
    adapter: AdapterSpec | None = None
    grid: Grid = Grid(fsdp=2, tensor=2)
    accumulation: int = 1


LORA = AdapterSpec(4, 4.0)
# Quantized weights have blocks of 64 along their inputs, which a shard has whole.
WIDE = {**HF, "hidden_size": 128, "intermediate_size": 256}
ONE, SLOW = (), (pytest.mark.slow,)
VARIANTS: dict[str, tuple[Variant, tuple[Any, ...]]] = {
    "kl": (Variant({**KL, "kl": Kl(0.5, "supervised")}, accumulation=2), ONE),
    "kl of all tokens": (Variant({**KL, "kl": Kl(0.5, "all")}), SLOW),
    "kl of an adapter": (Variant({**KL, "kl": Kl(0.5, "supervised")}, adapter=LORA), ONE),
    "l2_sp": (Variant({"step_terms": ("l2_sp",), "penalty": Penalty("l2_sp", 0.1)}), SLOW),
    "ewc": (Variant({"step_terms": ("ewc",), "penalty": Penalty("ewc", 0.1)}), ONE),
    "ewc and kl": (
        Variant(
            {
                **KL,
                "kl": Kl(0.5, "supervised"),
                "step_terms": ("ewc",),
                "penalty": Penalty("ewc", 0.1),
            }
        ),
        SLOW,
    ),
    "dropout": (
        Variant(
            {"random_seed": 5},
            adapter=replace(LORA, dropout=0.3),
            grid=Grid(data=2, fsdp=2),
            accumulation=2,
        ),
        ONE,
    ),
    "noise": (Variant({"random_seed": 5, "noise_alpha": 5.0}), SLOW),
    "int8": (Variant({}, adapter=replace(LORA, base_type="int8"), grid=Grid(fsdp=2)), SLOW),
    "nf4": (Variant({}, adapter=replace(LORA, base_type="nf4"), grid=Grid(fsdp=2)), ONE),
    "dora": (Variant({}, adapter=replace(LORA, dora=True), grid=Grid(fsdp=2)), SLOW),
    **{name: (Variant({}, optimizer=name), SLOW) for name in ("adafactor", "lion", "sgd")},
    "muon": (Variant({}, optimizer="muon"), ONE),
    "adamw_8bit": (Variant({}, optimizer="adamw_8bit", grid=Grid(fsdp=2)), SLOW),
}


def optimizer_of(name: str) -> Optimizer:
    more = {"momentum": 0.9} if name == "sgd" else {}
    return make_optimizer(name, betas=None, eps=1e-3, weight_decay=0.1, **more)


def model_of(spec: AdapterSpec | None, *, quantized: bool = True) -> CausalLM:
    wide = spec is not None and spec.base_type != "run"
    model = CausalLM(architecture_from_hf(WIDE if wide else HF))
    if spec is not None:
        apply_adapter(model, spec)
        if quantized:
            quantize_base(model, spec.base_type, lambda _: 2)
    return model


def values_of(spec: AdapterSpec | None) -> dict[str, Tensor]:
    """Random weights, quantized as the base is."""
    model = model_of(spec, quantized=False)
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


def trained(backend: Any, variant: Variant) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The numbers of two steps, and the weights after them."""
    spec, start = variant.adapter, values_of(variant.adapter)
    plain = make_case({"accumulation": variant.accumulation}).options
    options: StepOptions = replace(plain, **variant.options)
    needs_base = options.kl is not None and spec is None
    with torch.device("meta"):
        model = model_of(spec)

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


@pytest.fixture(scope="module", autouse=True)
def end_of_processes() -> Iterator[None]:
    yield
    stop_processes()


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=marks) for name, (_, marks) in VARIANTS.items()]
)
def test_two_steps_equal_the_native_backend(name: str) -> None:
    variant, _ = VARIANTS[name]
    expected, weights = trained(NativeBackend({}, {}, full_precision=True), variant)
    numbers, found = trained(simulated_backend(variant.grid), variant)
    assert numbers == [pytest.approx(each, rel=1e-5) for each in expected]
    assert found.keys() == weights.keys()
    for key, weight in weights.items():
        torch.testing.assert_close(found[key], weight, rtol=1e-5, atol=1e-5)
