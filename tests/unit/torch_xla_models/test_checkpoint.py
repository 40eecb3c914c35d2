"""Checkpoints taken from one way to run and restored in another."""

from __future__ import annotations

import pytest
import reference
import torch
from halfway import HALF, resumed, run, same, whole

from torchprime.config.sections.remat import RematConfig
from torchprime.training.optim.adafactor import Adafactor

FSDP4 = dict(mesh={"fsdp": 4})
CUT_BOTH_WAYS = dict(mesh={"fsdp": 2, "tensor": 2})
SCANNED = dict(
    mesh={"data": 2, "fsdp": 2}, remat=RematConfig(policy="full", scan_layers=True), accumulation=2
)


@pytest.fixture(scope="module")
def halves(make_backend):
    """Return the tensors and numbers of a way's first half, and those of its second."""
    done: dict[str, tuple] = {}

    def get(key: str, **way):
        if key not in done:
            backend = make_backend(**way)
            run(backend, range(HALF))
            tensors = whole(backend)
            assert backend.progress() == (HALF, 0)
            done[key] = tensors, run(backend, range(HALF, reference.STEPS)), whole(backend)
        return done[key]

    return get


@pytest.mark.parametrize("way", [FSDP4, SCANNED], ids=["fsdp4", "scanned"])
def test_a_resumed_run_is_bit_identical(way: dict, make_backend, halves) -> None:
    tensors, numbers, end = halves(str(way), **way)
    again = make_backend(**way, resumed=resumed(tensors))
    same(whole(again), tensors)
    assert run(again, range(HALF, reference.STEPS)) == numbers
    same(whole(again), end)


def test_names_and_values_are_those_of_the_reference(halves, reference_runs) -> None:
    tensors, _, end = halves(str(SCANNED), **SCANNED)
    names = reference_runs[False]["weights"]
    slots = ("model", "optimizer.exp_avg", "optimizer.exp_avg_sq")
    assert tensors.keys() == {f"{slot}.{name}" for slot in slots for name in names}
    for name, weight in names.items():
        torch.testing.assert_close(end[f"model.{name}"], weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("before", "after"), [(SCANNED, CUT_BOTH_WAYS), (FSDP4, SCANNED)])
def test_another_way_goes_on(before: dict, after: dict, make_backend, halves) -> None:
    tensors, numbers, _ = halves(str(before), **before)
    other = make_backend(**after, resumed=resumed(tensors))
    same(whole(other), tensors)
    found = run(other, range(HALF, reference.STEPS))
    assert [n.loss for n in found] == pytest.approx([n.loss for n in numbers], rel=1e-5)
    assert [n.grad_norm for n in found] == pytest.approx([n.grad_norm for n in numbers], rel=1e-5)


@pytest.mark.slow
def test_masters_and_factored_state(make_backend) -> None:
    """bf16 weights with fp32 copies, row and column means of a stack."""
    way = dict(
        mesh={"fsdp": 2, "tensor": 2}, remat=RematConfig(scan_layers=True), dtype=torch.bfloat16
    )
    first = make_backend(**way, optimizer=Adafactor())
    run(first, range(HALF))
    tensors = whole(first)
    layer = "model.layers.1.mlp.down_proj.weight"
    rows, columns = tensors[f"master.{layer}"].shape
    assert tensors[f"optimizer.exp_avg_sq_row.{layer}"].shape == (rows,)
    assert tensors[f"optimizer.exp_avg_sq_col.{layer}"].shape == (columns,)
    assert tensors[f"model.{layer}"].dtype == torch.bfloat16
    second = make_backend(**way, optimizer=Adafactor(), resumed=resumed(tensors))
    steps = range(HALF, reference.STEPS)
    assert run(second, steps) == run(first, steps)
    same(whole(second), whole(first))


def test_random_state_comes_back(make_backend, halves) -> None:
    backend = make_backend(**FSDP4, resumed=resumed(halves(str(FSDP4), **FSDP4)[0]))
    backend.set_rng_state("12345")
    assert backend.rng_state() == "12345"
    assert backend.processes.gather({"a": 1}) == [{"a": 1}]
