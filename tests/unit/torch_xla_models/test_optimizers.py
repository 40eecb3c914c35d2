"""Each optimizer on sharded and stacked weights against its reference on whole ones, and its state
across checkpoints and meshes."""

from __future__ import annotations

from functools import cache
from typing import Any

import answers
import pytest
import reference
import torch
from halfway import HALF, resumed, run, same, whole
from small_optimizers import EMA_DECAY, GROUPS, small_optimizer

from torchprime.config.sections.remat import RematConfig
from torchprime.training.optim.ema import WithEma
from torchprime.training.optim.groups import grouped

WAYS: dict[str, dict[str, Any]] = {
    "fsdp4": dict(mesh={"fsdp": 4}),
    "fsdp2-tensor2": dict(mesh={"fsdp": 2, "tensor": 2}),
    "scan": dict(mesh={"fsdp": 2, "tensor": 2}, remat=RematConfig(scan_layers=True)),
}
FAST = {("muon", "scan"), ("adamw_8bit", "fsdp4")}
CASES = [
    pytest.param(name, way, marks=[] if (name, way) in FAST else [pytest.mark.slow])
    for name in ("muon", "lion", "sgd", "adamw_8bit")
    for way in WAYS
]


@cache
def expected(name: str) -> dict[str, Any]:
    return reference.train(optimizer_name=name)


@pytest.mark.parametrize(("name", "way"), CASES)
def test_sharded_weights_are_the_references_and_resume_exactly(
    name: str, way: str, make_backend
) -> None:
    backend = make_backend(**WAYS[way], optimizer=small_optimizer(name))
    before = backend.compiles()
    first = run(backend, range(HALF))
    halfway = whole(backend)
    rest = run(backend, range(HALF, reference.STEPS))
    assert backend.compiles() == before + 1
    agree(dict(backend.weights()), expected(name), exact=name != "adamw_8bit")
    assert [n.loss for n in first + rest] == pytest.approx(expected(name)["losses"], rel=1e-4)
    again = make_backend(**WAYS[way], optimizer=small_optimizer(name), resumed=resumed(halfway))
    same(whole(again), halfway)
    assert run(again, range(HALF, reference.STEPS)) == rest
    same(whole(again), whole(backend))
    if name == "adamw_8bit":
        layer = "model.layers.1.mlp.down_proj.weight"
        codes, scales = (
            halfway[f"optimizer.exp_avg_{kind}.{layer}"] for kind in ("codes", "scales")
        )
        assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (16, 32), (16, 1))


def agree(found: dict[str, torch.Tensor], reference_run: dict[str, Any], *, exact: bool) -> None:
    """Weights agree to rounding; 8 bits may round a value between two levels to the other one."""
    assert found.keys() == reference_run["weights"].keys()
    for name, weight in reference_run["weights"].items():
        moved = (weight - reference_run["start"][name]).abs().max()
        error = (found[name] - weight).abs()
        assert moved > 1e-3, name
        assert error.max() < (1e-4 if exact else 2e-2) * moved, f"{name}: {error.max():.1e}"
        assert error.mean() < 1e-4 * moved, name


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_evaluation_measures_the_average_and_changes_nothing(
    dtype: torch.dtype, make_backend
) -> None:
    """Held-out loss and answers are those of a model whose weights are the averages."""
    way = {**WAYS["scan"], "dtype": dtype}
    optimizer = WithEma(small_optimizer("adamw"), EMA_DECAY)
    backend = make_backend(**way, optimizer=optimizer)
    run(backend, range(HALF))
    tensors = whole(backend)
    names = [name for name, _ in backend.weights()]
    averages = {f"model.{name}": tensors[f"optimizer.ema.{name}"].to(dtype) for name in names}
    other = make_backend(**way, optimizer=optimizer, resumed=resumed(tensors | averages))
    given = answers.options(max_length=80, batch_size=8)
    prompts = [[t % reference.V for t in p] for p in answers.prompts((3, 20))]

    def measured(of: Any) -> tuple:
        handle = of.eval_step(of.put(reference.make_batch(99), 1))
        return (
            of.read_eval([handle]),
            of.generate(prompts, given),
            of.logits(list(range(11))).tolist(),
        )

    expected = measured(other)
    with backend.averaged():
        assert measured(backend) == expected
    assert measured(backend)[0] != expected[0]
    same(whole(backend), tensors)
    before = backend.compiles()
    rest = run(backend, range(HALF, reference.STEPS))
    assert backend.compiles() == before
    again = make_backend(**way, optimizer=optimizer, resumed=resumed(tensors))
    assert run(again, range(HALF, reference.STEPS)) == rest


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon", "adamw_8bit"])
def test_another_mesh_continues(name: str, make_backend) -> None:
    first = make_backend(**WAYS["fsdp4"], optimizer=small_optimizer(name))
    run(first, range(HALF))
    tensors = whole(first)
    other = make_backend(**WAYS["scan"], optimizer=small_optimizer(name), resumed=resumed(tensors))
    same(whole(other), tensors)
    run(other, range(HALF, reference.STEPS))
    agree(dict(other.weights()), expected(name), exact=name != "adamw_8bit")


@pytest.mark.parametrize("way", ["scan", pytest.param("fsdp2-tensor2", marks=pytest.mark.slow)])
def test_groups_and_frozen_weights_are_torchs(way: str, make_backend) -> None:
    """A stack's layers have rates of their own; frozen weights have no state and are saved."""
    adamw = small_optimizer("adamw")
    backend = make_backend(**WAYS[way], optimizer=grouped(adamw, GROUPS), groups=GROUPS)
    before = backend.compiles()
    run(backend, range(HALF))
    halfway = whole(backend)
    rest = run(backend, range(HALF, reference.STEPS))
    assert backend.compiles() == before + 1
    expected = reference.train_in_groups()
    found = dict(backend.weights())
    assert found.keys() == expected["weights"].keys()
    for name, weight in expected["weights"].items():
        moved = (weight - expected["start"][name]).abs().max()
        error = (found[name] - weight).abs().max()
        frozen = "embed_tokens" in name or "down_proj" in name
        assert (moved == 0) == frozen
        assert error == 0 if frozen else error < 1e-4 * moved, name
        assert f"model.{name}" in halfway
        assert (f"optimizer.exp_avg.{name}" in halfway) == (not frozen)
    again = make_backend(
        **WAYS[way], optimizer=grouped(adamw, GROUPS), groups=GROUPS, resumed=resumed(halfway)
    )
    assert run(again, range(HALF, reference.STEPS)) == rest
    same(whole(again), whole(backend))
