"""The step's graph, run operation by operation on simulated chips, against plain torch."""

from __future__ import annotations

import pytest
import torch
from eager_chips import Chips, Each
from torch import Tensor
from torchtpu_case import LR, Case, make_batch, make_case

from torchprime.errors import ConfigError
from torchprime.torch_native.tpu.grid import Grid
from torchprime.torch_native.tpu.parameters import hold
from torchprime.torch_native.tpu.step import Input, Rows, StepBuilder, Training, initial_values
from torchprime.training.step import (
    ParameterState,
    TrainState,
    Update,
    host_fields,
    train_step,
)

STEPS = 2


def on_one_device(way: dict) -> tuple[list[list[float]], dict[str, Tensor]]:
    """The same training by `train_step`, without a grid, a loop or a collective."""
    case = make_case({**way, "accumulation": 1})
    states = {}
    for name, parameter in case.model.named_parameters():
        value = torch.nn.Parameter(case.start[name].clone(), requires_grad=parameter.requires_grad)
        owner, _, leaf = name.rpartition(".")
        setattr(case.model.get_submodule(owner), leaf, value)
        if not parameter.requires_grad:
            continue
        info = replace_info(name, value)
        slots = {slot: torch.zeros(value.shape) for slot in case.optimizer.slots(info)}
        states[name] = ParameterState(info, value.detach(), slots, None)
    state, numbers = TrainState(states, torch.zeros(()), torch.zeros(())), []
    for step in range(STEPS):
        fields = tuple(host_fields(make_batch(step), case.options))
        update = Update(state, case.optimizer, case.options)
        found = train_step(
            update, case.model, fields, torch.tensor(LR), lambda micro, batch, w: micro(batch, w)
        )
        numbers.append(found[:2].tolist())
    return numbers, {name: each.weight for name, each in states.items()}


def replace_info(name: str, value: Tensor):
    from torchprime.training.optim.optimizer import Parameter

    return Parameter((name,), tuple(value.shape), value.dtype)


def on_chips(way: dict) -> tuple[list[list[float]], dict[str, Tensor], list[str]]:
    case, grid = make_case(way), Grid(**way["mesh"])
    remat = way.get("remat", True)
    parts = hold(case.model, case.table, grid, torch.float32, remat=remat)
    builder = StepBuilder(parts, Training(case.optimizer, case.options))
    first = host_fields(make_batch(0), case.options)
    micro, several = case.options.gradient_accumulation_steps, grid.data * grid.fsdp
    rows = Rows(
        micro, len(first[0]) // micro // several, first[0].shape[1], tuple(f.dtype for f in first)
    )
    step = builder.build(rows)
    tensor_of, ranks = case.start.__getitem__, range(grid.count)
    starts = [initial_values(step, rank, tensor_of, builder.buffers) for rank in ranks]
    state = [{each.name: value for each, value in start} for start in starts]
    numbers, calls = [], []
    for number in range(STEPS):
        fields = host_fields(make_batch(number), case.options)

        def given(each: Input, rank: int, fields: list[Tensor] = fields) -> Tensor:
            if each.name == "lr":
                return torch.tensor(LR)
            if not each.name.startswith("field."):
                return state[rank][each.name]
            place = grid.place(rank)
            whole = fields[int(each.name[6:])].view(micro, several, -1, each.shape[2])
            return whole[:, place["data"] * grid.fsdp + place["fsdp"]]

        chips = Chips(step.graph, grid)
        with torch.no_grad():
            results = chips.run(*(Each([given(e, rank) for rank in ranks]) for e in step.inputs))
        written = [each.name for each in step.inputs if each.donated]
        for name, result in zip(written, results[1:], strict=True):
            for rank in ranks:
                state[rank][name] = result.values[rank]
        numbers.append(results[0].values[0][:2].tolist())
        calls = chips.calls
    weights = {}
    for held in step.held:
        whole = torch.empty(held.shape)
        for rank in ranks:
            whole[held.cut.region(held.shape, rank)] = state[rank][f"model.{held.name}"].float()
        weights |= dict(zip(held.names, whole if held.stacked else [whole], strict=True))
    return numbers, weights, calls


@pytest.mark.parametrize(
    "way",
    [
        {"mesh": {"fsdp": 2, "tensor": 2}, "accumulation": 2},
        pytest.param({"mesh": {"data": 2, "fsdp": 2}, "remat": False}, marks=pytest.mark.slow),
        pytest.param({"mesh": {"fsdp": 2, "tensor": 2}, "lora": 4}, marks=pytest.mark.slow),
        pytest.param(
            {"mesh": {"fsdp": 2, "tensor": 2}, "gemma2": True, "accumulation": 2},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_grid_computes_what_one_device_does(way: dict) -> None:
    expected, weights = on_one_device(way)
    numbers, found, _ = on_chips(way)
    assert numbers == [pytest.approx(each, rel=1e-5) for each in expected]
    for name, weight in weights.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5)


def refused(way: dict) -> str:
    case: Case = make_case(way)
    with pytest.raises(ConfigError) as error:
        hold(case.model, case.table, Grid(**way["mesh"]), torch.float32, remat=True)
    return str(error.value)


def test_what_one_program_cannot_do_is_refused() -> None:
    assert "num_attention_heads" in refused({"mesh": {"tensor": 8}})
    assert "is not divisible" in refused({"mesh": {"fsdp": 3}})
