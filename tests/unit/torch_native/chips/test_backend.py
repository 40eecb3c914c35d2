"""The backend of one program per chip, on simulated chips, against the native backend."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from simulated import simulated_backend
from torch import Tensor
from torchtpu_case import LR, VOCABULARY, Case, make_batch, make_case

from torchprime.generation.decode import GenerateOptions
from torchprime.torch_native.backend import NativeBackend
from torchprime.torch_native.runtime import stop_processes
from torchprime.torch_native.tpu.grid import Grid
from torchprime.training.backend import ResumedState
from torchprime.training.optim.ema import WithEma

GRID = Grid(fsdp=2, tensor=2)
PROMPTS = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6], [11, 3]]


def placed(backend: Any, case: Case) -> Any:
    start = {name: value.clone() for name, value in case.start.items()}
    backend.place(case.model, case.table, start.__getitem__, torch.float32)
    return backend


def prepared(backend: Any, case: Case, resumed: ResumedState | None = None) -> Any:
    optimizer = WithEma(case.optimizer, 0.5)  # pyright: ignore[reportArgumentType]
    placed(backend, case).prepare_training(optimizer, case.options, resumed)
    return backend


def step(backend: Any, number: int) -> list[float]:
    handle = backend.train_step(backend.put(make_batch(number), 2), LR)
    found = backend.read(handle)
    return [found.loss, found.grad_norm, found.weight_sum, *found.source_loss_sums]


def held_out(backend: Any) -> tuple[float, ...]:
    return backend.read_eval([backend.eval_step(backend.put(make_batch(9), 2), 2)])


@pytest.fixture(scope="module")
def way() -> dict[str, Any]:
    return {"accumulation": 2}


@pytest.fixture(scope="module")
def native(way: dict[str, Any]) -> Iterator[Any]:
    yield prepared(NativeBackend({}, {}, full_precision=True), make_case(way))
    stop_processes()


@pytest.fixture(scope="module")
def chips(way: dict[str, Any]) -> Any:
    return prepared(simulated_backend(GRID), make_case(way))


@pytest.fixture(scope="module")
def trained(native: Any, chips: Any) -> list[list[list[float]]]:
    """The numbers of two steps of both."""
    return [[step(backend, number) for number in range(2)] for backend in (chips, native)]


def whole(backend: Any) -> dict[str, Tensor]:
    """All tensors of a checkpoint, from their regions."""
    found = {}
    for shards in backend.checkpoint_tensors():
        values = torch.full(shards.shape, float("nan"), dtype=shards.dtype)
        for (offsets, sizes), part in zip(shards.chunks, shards.read(), strict=True):
            place = tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))
            assert values[place].isnan().all(), "a region is listed twice"
            values[place] = part
        assert not values.isnan().any(), "a region is missing"
        found[shards.name] = values
    return found


def test_steps_equal_the_native_backend(trained) -> None:
    ours, theirs = trained
    assert ours == [pytest.approx(each, rel=1e-5) for each in theirs]


def test_checkpoints_hold_the_same_tensors(trained, chips, native) -> None:
    ours, theirs = whole(chips), whole(native)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-5, atol=1e-5)
    exported = dict(chips.weights())
    assert set(exported) == {name.removeprefix("model.") for name in ours if name[:5] == "model"}
    for name, tensor in exported.items():
        assert torch.equal(tensor, ours[f"model.{name}"])


def test_a_checkpoint_of_the_native_backend_resumes(trained, native, way) -> None:
    stored = {name: value.clone() for name, value in whole(native).items()}

    def tensor_of(name: str, region: Any = None) -> Tensor:
        if region is None:
            return stored[name]
        return stored[name][tuple(slice(o, o + s) for o, s in zip(*region, strict=True))]

    case = make_case(way)
    start = {name: stored[f"model.{name}"] for name in case.start}
    again = prepared(
        simulated_backend(GRID), case._replace(start=start), ResumedState(tensor_of, 2)
    )
    assert again.progress() == (2, 0)
    assert step(again, 2) == pytest.approx(step(native, 2), rel=1e-5)


def test_looking_changes_nothing_and_equals_the_native_backend(trained, chips, native) -> None:
    before = whole(chips)
    ids = [3, 1, 4, 1, 5]
    if chips.progress() != native.progress():
        step(chips, 2)
        before = whole(chips)
    assert held_out(chips) == pytest.approx(held_out(native), rel=1e-5)
    torch.testing.assert_close(chips.logits(ids), native.logits(ids), rtol=1e-4, atol=1e-5)
    with chips.averaged(), native.averaged():
        assert held_out(chips) == pytest.approx(held_out(native), rel=1e-5)
    after = whole(chips)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def options(**more: Any) -> GenerateOptions:
    return GenerateOptions(max_new_tokens=10, stop_ids=(0,), max_length=16, batch_size=4, **more)


@pytest.mark.parametrize("remat", [True, False], ids=["scanned", "unrolled"])
@pytest.mark.parametrize("more", [{}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "seed": 3}])
def test_answers_equal_the_native_backend(native, remat: bool, more: dict[str, Any]) -> None:
    case = make_case({})
    theirs = placed(NativeBackend({}, {}, full_precision=True), make_case({}))
    ours = placed(simulated_backend(GRID, remat), case)
    expected = theirs.generate(PROMPTS, options(**more))
    assert ours.generate(PROMPTS, options(**more)) == expected
    assert len({token for answer in expected for token in answer.ids}) > 3
    assert all(token < VOCABULARY for answer in expected for token in answer.ids)
    made = ours.compiles()
    ours.generate(PROMPTS, options(**more))
    assert ours.compiles() == made, "a program was compiled again"
